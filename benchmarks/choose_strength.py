"""Which strength a hypernetwork's LoRAs should have, on validation people: its ``card["strength"]``.

python -m data_builder benchmark -o runs/data/benchmark-validation --split validation --people 16
python benchmarks/choose_strength.py runs/data/benchmark-validation [--model DIR] [--people 12]
"""

import argparse
from pathlib import Path

import torch

from hyperlora import pretrained
from hyperlora.cpu import keep_heap
from hyperlora.diffusion.diffusion_base import load_base
from hyperlora.encoders.attribute_classifier import Reader
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.report import markdown
from hyperlora.evaluation.subject_evaluator import Judge
from hyperlora.pipelines.image_to_lora import ImageToLora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("--model", default=pretrained.MODEL)
    parser.add_argument("--people", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 1.25, 1.5, 1.75])
    arguments = parser.parse_args()
    keep_heap()
    base = load_base(pretrained.BASE)
    model = ImageToLora.from_pretrained(arguments.model, base=base)
    benchmark = load_benchmark(arguments.benchmark, base.resolution, arguments.people)
    judge = Judge(base, Reader.from_pretrained(pretrained.EVALUATOR), benchmark, steps=arguments.steps)
    with torch.no_grad():
        made = model.forward(benchmark.photos[:, :1]) * (1 / float(model.card.get("strength", 1.0)))
    rows = [judge.row("no LoRA", made * 0.0)]
    rows += [judge.row(f"strength {s:g}", made * s) for s in arguments.strengths]
    print(markdown(rows))


if __name__ == "__main__":
    main()
