"""Photos to LoRAs: batch 32 against 1, and against fitting a LoRA per subject, in one run.

    python benchmarks/generating.py [--photos 64] [--fit-steps 20]

The fit is timed over ``--fit-steps`` steps and reported for ``--as-if`` steps; its time is linear in them.
"""

import argparse
import time

import torch

from hyperlora import pretrained
from hyperlora.cpu import keep_heap
from hyperlora.diffusion.diffusion_base import load_base
from hyperlora.encoders.attribute_classifier import Reader
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.subject_evaluator import Judge
from hyperlora.evaluation.subject_suite import FitSettings, fitted_loras
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.refine_generated import refined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=64)
    parser.add_argument("--fit-steps", type=int, default=20)
    parser.add_argument("--as-if", type=int, default=300)
    arguments = parser.parse_args()
    keep_heap()
    base = load_base(pretrained.BASE)
    model = ImageToLora.from_pretrained(pretrained.MODEL, base=base)
    benchmark = load_benchmark(pretrained.BENCHMARK, base.resolution, arguments.photos)
    photos = benchmark.photos[:, :1]
    judge = Judge(base, Reader.from_pretrained(pretrained.EVALUATOR), benchmark)
    rates = {}
    with torch.no_grad():
        for size in (1, 32):
            model.forward(photos[:size])  # warm up
            began = time.perf_counter()
            for chunk in photos.split(size):
                model.forward(chunk)
            rates[size] = len(photos) / (time.perf_counter() - began)
    began = time.perf_counter()
    refined(model, base, model.forward(photos[:1]), photos[:1], steps=40)
    finer = time.perf_counter() - began
    began = time.perf_counter()
    fitted_loras(judge, model, photos[:1], FitSettings(steps=arguments.fit_steps, prior_images=1))
    fitted = (time.perf_counter() - began) * arguments.as_if / arguments.fit_steps
    print(f"photos/s: batch 1 {rates[1]:.1f}, batch 32 {rates[32]:.1f}, ratio {rates[32] / rates[1]:.2f}")
    print(f"seconds: one pass {1 / rates[1]:.4f}, refined 40 {finer:.2f}, fitted {arguments.as_if} {fitted:.1f}")
    print(f"one pass is {fitted * rates[1]:.0f}x, refined {fitted / finer:.1f}x faster than fitting")


if __name__ == "__main__":
    main()
