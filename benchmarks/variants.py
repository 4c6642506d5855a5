"""Several hypernetworks on the same test people in one table, each with all its controls.

    python benchmarks/variants.py NAME=DIR... [--people 16] [--strengths 0.6 0.8] [--refine 0] [--fit 0]

Models that were trained on another base than the bundle's are refused. ``--fit`` adds LoRAs fitted to the same photo,
with the sites and rank of the first model.
"""

import argparse
from dataclasses import replace

from hyperlora import pretrained
from hyperlora.cpu import keep_heap
from hyperlora.diffusion.diffusion_base import load_base
from hyperlora.encoders.attribute_classifier import Reader
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.report import markdown
from hyperlora.evaluation.subject_evaluator import Judge
from hyperlora.evaluation.subject_suite import NO_LORA, FitSettings, rows_of
from hyperlora.pipelines.image_to_lora import ImageToLora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--people", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.6, 0.8])
    parser.add_argument("--refine", type=int, default=0)
    parser.add_argument("--fit", type=int, default=0)
    arguments = parser.parse_args()
    keep_heap()
    base = load_base(pretrained.BASE)
    benchmark = load_benchmark(pretrained.BENCHMARK, base.resolution, arguments.people)
    judge = Judge(base, Reader.from_pretrained(pretrained.EVALUATOR), benchmark, steps=arguments.steps)
    table = [judge.row(NO_LORA, None)]
    fitting = FitSettings(steps=arguments.fit) if arguments.fit else None
    for given in arguments.models:
        name, folder = given.split("=", 1)
        model = ImageToLora.from_pretrained(folder, base=base)
        found = rows_of(
            judge, model, strengths=tuple(arguments.strengths), refine_steps=arguments.refine, fitting=fitting
        )
        table += [replace(row, name=f"{name}: {row.name}") for row in found]
        fitting = None
        print(markdown(table), flush=True)


if __name__ == "__main__":
    main()
