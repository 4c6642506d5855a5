"""Several hypernetworks on the same test subjects in one table, each with all controls.

    python -m benchmarks.quality.hypernetwork_comparison NAME=DIR... [--num-subjects 16]
        [--strengths 0.6 0.8] [--refine-steps 0] [--finetune-steps 0]

Models of another base model are refused. ``--finetune-steps`` adds LoRAs fine-tuned on the same
photo, with the layout of the first model.
"""

import argparse
from dataclasses import replace

from benchmarks.avatar_evaluator import load_subject_evaluator
from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.evaluation.report import format_markdown
from hyperlora.evaluation.subject_suite import (
    BASELINE_NAME,
    FineTuneBaseline,
    SubjectSuiteConfig,
    evaluate_model,
)
from hyperlora.pipelines.image_to_lora import ImageToLora


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--num-subjects", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.6, 0.8])
    parser.add_argument("--refine-steps", type=int, default=0)
    parser.add_argument("--finetune-steps", type=int, default=0)
    arguments = parser.parse_args()
    disable_malloc_trim()
    evaluator = load_subject_evaluator(
        pretrained.BENCHMARK_DIR, arguments.num_subjects, arguments.steps
    )
    results = [evaluator.evaluate(BASELINE_NAME, None)]
    config = SubjectSuiteConfig(
        strengths=tuple(arguments.strengths), refine_steps=arguments.refine_steps
    )
    for i, model_spec in enumerate(arguments.models):
        name, folder = model_spec.split("=", 1)
        model = ImageToLora.from_pretrained(folder, base=evaluator.base)
        baseline = None
        if i == 0 and arguments.finetune_steps:
            baseline = FineTuneBaseline(num_steps=arguments.finetune_steps)
        model_config = replace(config, finetune_baseline=baseline)
        results += [
            replace(result, name=f"{name}: {result.name}")
            for result in evaluate_model(evaluator, model, model_config)
        ]
        print(format_markdown(results), flush=True)


if __name__ == "__main__":
    main()
