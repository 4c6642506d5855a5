"""Photos per second from photo to LoRA, and the speed-up over refinement and per-subject
fine-tuning.

    python -m benchmarks.speed.lora_generation [--num-photos 64] [--finetune-steps 20]

Fine-tuning is timed over ``--finetune-steps`` steps and extrapolated to ``--extrapolated-steps``,
since its time is linear in the steps.
"""

import argparse
import time

import torch

from benchmarks.avatar_evaluator import load_subject_evaluator
from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.evaluation.subject_suite import FineTuneBaseline, fit_subject_loras
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.refine_generated import refine_predictions

REFINE_STEPS = 40


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-photos", type=int, default=64)
    parser.add_argument("--finetune-steps", type=int, default=20)
    parser.add_argument("--extrapolated-steps", type=int, default=300)
    arguments = parser.parse_args()
    disable_malloc_trim()
    evaluator = load_subject_evaluator(pretrained.BENCHMARK_DIR, arguments.num_photos)
    base = evaluator.base
    model = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR, base=base)
    photos = evaluator.benchmark.photos[:, :1]  # [subjects, 1, 3, h, w]
    photos_per_s = {}
    with torch.no_grad():
        for batch_size in (1, 32):
            model.forward(photos[:batch_size])  # warm up
            start_time = time.perf_counter()
            for batch in photos.split(batch_size):
                model.forward(batch)
            photos_per_s[batch_size] = len(photos) / (time.perf_counter() - start_time)
    start_time = time.perf_counter()
    predicted = model.forward(photos[:1])
    refine_predictions(model, base, predicted, photos[:1], num_steps=REFINE_STEPS)
    refine_time_s = time.perf_counter() - start_time
    start_time = time.perf_counter()
    baseline = FineTuneBaseline(num_steps=arguments.finetune_steps, num_class_images=1)
    fit_subject_loras(evaluator, model, photos[:1], baseline)
    measured_time_s = time.perf_counter() - start_time
    num_steps = arguments.extrapolated_steps
    finetune_time_s = measured_time_s * num_steps / arguments.finetune_steps
    single, batched = photos_per_s[1], photos_per_s[32]
    print(f"photos/s: batch 1 {single:.1f}, batch 32 {batched:.1f}, ratio {batched / single:.2f}")
    print(
        f"seconds: one pass {1 / single:.4f}, refined {REFINE_STEPS} steps {refine_time_s:.2f}, "
        f"fine-tuned {num_steps} steps {finetune_time_s:.1f}"
    )
    print(
        f"one pass is {finetune_time_s * single:.0f}x, "
        f"refined {finetune_time_s / refine_time_s:.1f}x faster than fine-tuning"
    )


if __name__ == "__main__":
    main()
