"""Which number of steps and learning rate suit LoRAs fitted per subject, on validation people.

python -m data_builder benchmark -o runs/data/benchmark-validation --split validation --people 16
python benchmarks/sweep_fitting.py runs/data/benchmark-validation [--people 8]
"""

import argparse
from pathlib import Path

from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.report import format_markdown
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
from hyperlora.evaluation.subject_suite import FineTuneBaseline, fit_subject_loras
from hyperlora.pipelines.image_to_lora import ImageToLora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 350, 500])
    arguments = parser.parse_args()
    disable_malloc_trim()
    base = load_diffusion_base(pretrained.BASE_DIR)
    model = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR, base=base)
    benchmark = load_benchmark(arguments.benchmark, base.resolution, arguments.people)
    judge = SubjectEvaluator(
        base, AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR), benchmark
    )
    rows = []
    for lr in arguments.lr:
        settings = FineTuneBaseline(num_steps=max(arguments.steps), lr=lr)
        loras_by_step = fit_subject_loras(
            judge, model, benchmark.photos[:, :1], settings, arguments.steps
        )
        rows += [judge.evaluate(f"lr {lr:g}, {n} steps", lora) for n, lora in loras_by_step.items()]
    print(format_markdown(rows))


if __name__ == "__main__":
    main()
