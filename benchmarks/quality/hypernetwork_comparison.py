"""Several hypernetworks on the same test people in one table, each with all its controls.

    python benchmarks/variants.py NAME=DIR... [--people 16] [--strengths 0.6 0.8] [--refine 0] [--fit 0]

Models that were trained on another base than the bundle's are refused. ``--fit`` adds LoRAs fitted to the same photo,
with the sites and rank of the first model.
"""

import argparse
from dataclasses import replace

from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.report import format_markdown
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
from hyperlora.evaluation.subject_suite import BASELINE_NAME, FineTuneBaseline, evaluate_model
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
    disable_malloc_trim()
    base = load_diffusion_base(pretrained.BASE_DIR)
    benchmark = load_benchmark(pretrained.BENCHMARK_DIR, base.resolution, arguments.people)
    judge = SubjectEvaluator(
        base,
        AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR),
        benchmark,
        num_inference_steps=arguments.steps,
    )
    table = [judge.evaluate(BASELINE_NAME, None)]
    finetune_baseline = FineTuneBaseline(num_steps=arguments.fit) if arguments.fit else None
    for model_spec in arguments.models:
        name, folder = model_spec.split("=", 1)
        model = ImageToLora.from_pretrained(folder, base=base)
        results = evaluate_model(
            judge,
            model,
            strengths=tuple(arguments.strengths),
            refine_steps=arguments.refine,
            finetune_baseline=finetune_baseline,
        )
        table += [replace(row, name=f"{name}: {row.name}") for row in results]
        finetune_baseline = None
        print(format_markdown(table), flush=True)


if __name__ == "__main__":
    main()
