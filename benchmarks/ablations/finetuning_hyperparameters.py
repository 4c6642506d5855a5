"""Learning rate and number of steps of per-subject fine-tuning, on validation subjects.

data-builder write-benchmark -o runs/data/benchmark-validation --split validation --num-subjects 16
python -m benchmarks.ablations.finetuning_hyperparameters runs/data/benchmark-validation
    [--num-subjects 8]
"""

import argparse
from pathlib import Path

from benchmarks.avatar_evaluator import load_subject_evaluator
from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.evaluation.report import format_markdown
from hyperlora.evaluation.subject_suite import FineTuneBaseline, fit_subject_loras
from hyperlora.pipelines.image_to_lora import ImageToLora


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("--num-subjects", type=int, default=8)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 350, 500])
    arguments = parser.parse_args()
    disable_malloc_trim()
    evaluator = load_subject_evaluator(arguments.benchmark, arguments.num_subjects)
    model = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR, base=evaluator.base)
    photos = evaluator.benchmark.photos[:, :1]
    results = []
    for lr in arguments.lr:
        baseline = FineTuneBaseline(num_steps=max(arguments.steps), lr=lr)
        loras_by_step = fit_subject_loras(evaluator, model, photos, baseline, arguments.steps)
        results += [
            evaluator.evaluate(f"lr {lr:g}, {num_steps} steps", loras)
            for num_steps, loras in loras_by_step.items()
        ]
    print(format_markdown(results))


if __name__ == "__main__":
    main()
