"""Several hypernetworks on the same test people in one table, each with another person's LoRA as its control.

    python benchmarks/variants.py NAME=DIR... [--people 16] [--refine 0]

Models that were trained on another base than the bundle's are refused.
"""

import argparse

import torch

from hyperlora import bundle
from hyperlora.encoders import Reader
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.personalisation import Judge
from hyperlora.evaluation.report import markdown
from hyperlora.heap import keep_heap
from hyperlora.pipelines import ImageToLora, load_base, refine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--people", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--refine", type=int, default=0)
    arguments = parser.parse_args()
    keep_heap()
    base = load_base(bundle.BASE)
    benchmark = load_benchmark(bundle.BENCHMARK, base.resolution, arguments.people)
    judge = Judge(base, Reader.from_pretrained(bundle.EVALUATOR), benchmark, steps=arguments.steps)
    one = benchmark.photos[:, :1]
    rows = [judge.row("base, no LoRA", None)]
    for given in arguments.models:
        name, folder = given.split("=", 1)
        model = ImageToLora.from_pretrained(folder, base=base)
        with torch.no_grad():
            made = model.forward(one)
        rows.append(judge.row(name, made))
        rows.append(judge.row(f"{name}, another's LoRA", made[torch.arange(len(made)).roll(1)]))
        if arguments.refine:
            finer = refine(base, made, one, steps=arguments.refine, label="refining")
            rows.append(judge.row(f"{name}, refined {arguments.refine} steps", finer))
    print(markdown(rows))


if __name__ == "__main__":
    main()
