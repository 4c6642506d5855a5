"""Which number of steps and learning rate suit LoRAs fitted per subject, on validation people.

python -m data_builder benchmark -o runs/data/benchmark-validation --split validation --people 16
python benchmarks/sweep_fitting.py runs/data/benchmark-validation [--people 8]
"""

import argparse
from pathlib import Path

from hyperlora import pretrained
from hyperlora.cpu import keep_heap
from hyperlora.diffusion.diffusion_base import load_base
from hyperlora.encoders.attribute_classifier import Reader
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.report import markdown
from hyperlora.evaluation.subject_evaluator import Judge
from hyperlora.evaluation.subject_suite import FitSettings, fitted_loras
from hyperlora.pipelines.image_to_lora import ImageToLora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 350, 500])
    arguments = parser.parse_args()
    keep_heap()
    base = load_base(pretrained.BASE)
    model = ImageToLora.from_pretrained(pretrained.MODEL, base=base)
    benchmark = load_benchmark(arguments.benchmark, base.resolution, arguments.people)
    judge = Judge(base, Reader.from_pretrained(pretrained.EVALUATOR), benchmark)
    rows = []
    for lr in arguments.lr:
        settings = FitSettings(steps=max(arguments.steps), lr=lr)
        fitted = fitted_loras(judge, model, benchmark.photos[:, :1], settings, arguments.steps)
        rows += [judge.row(f"lr {lr:g}, {n} steps", lora) for n, lora in fitted.items()]
    print(markdown(rows))


if __name__ == "__main__":
    main()
