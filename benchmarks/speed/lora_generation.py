"""Photos to LoRAs: batch 32 against 1, and against fitting a LoRA per subject, in one run.

    python benchmarks/generating.py [--photos 64] [--fit-steps 20]

The fit is timed over ``--fit-steps`` steps and reported for ``--as-if`` steps; its time is linear in them.
"""

import argparse
import time

import torch

from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
from hyperlora.evaluation.subject_suite import FineTuneBaseline, fit_subject_loras
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.refine_generated import refine_predictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=64)
    parser.add_argument("--fit-steps", type=int, default=20)
    parser.add_argument("--as-if", type=int, default=300)
    arguments = parser.parse_args()
    disable_malloc_trim()
    base = load_diffusion_base(pretrained.BASE_DIR)
    model = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR, base=base)
    benchmark = load_benchmark(pretrained.BENCHMARK_DIR, base.resolution, arguments.photos)
    photos = benchmark.photos[:, :1]
    judge = SubjectEvaluator(
        base, AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR), benchmark
    )
    rates = {}
    with torch.no_grad():
        for size in (1, 32):
            model.forward(photos[:size])  # warm up
            start_time = time.perf_counter()
            for chunk in photos.split(size):
                model.forward(chunk)
            rates[size] = len(photos) / (time.perf_counter() - start_time)
    start_time = time.perf_counter()
    refine_predictions(model, base, model.forward(photos[:1]), photos[:1], num_steps=40)
    refine_time_s = time.perf_counter() - start_time
    start_time = time.perf_counter()
    fit_subject_loras(
        judge,
        model,
        photos[:1],
        FineTuneBaseline(num_steps=arguments.fit_steps, num_class_images=1),
    )
    finetune_time_s = (time.perf_counter() - start_time) * arguments.as_if / arguments.fit_steps
    print(
        f"photos/s: batch 1 {rates[1]:.1f}, batch 32 {rates[32]:.1f}, ratio {rates[32] / rates[1]:.2f}"
    )
    print(
        f"seconds: one pass {1 / rates[1]:.4f}, refined 40 {refine_time_s:.2f}, fitted {arguments.as_if} {finetune_time_s:.1f}"
    )
    print(
        f"one pass is {finetune_time_s * rates[1]:.0f}x, refined {finetune_time_s / refine_time_s:.1f}x faster than fitting"
    )


if __name__ == "__main__":
    main()
