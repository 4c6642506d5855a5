"""Denoising steps and LoRA strength of edits, on validation identities.

data-builder write-edit-benchmark -o runs/data/edits-validation-benchmark --split validation
    --edits-per-kind 2
python -m benchmarks.ablations.edit_steps_and_strength runs/data/edits-validation-benchmark
    [--steps 2 4 8 20] [--strengths 1 1.3]
"""

import argparse
from dataclasses import replace

from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.edit_benchmark import EditBenchmark, load_edit_benchmark
from hyperlora.evaluation.edit_evaluator import EditEvaluator
from hyperlora.evaluation.edit_suite import generate_pair_loras
from hyperlora.pipelines.pair_to_lora import PairToLora

GROUP = "seen kinds"
METRICS = ("accuracy", "preservation", "edit_progress", "psnr")


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--model", default=pretrained.PAIR_TO_LORA_DIR)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8, 20])
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 1.3])
    parser.add_argument("--num-images", type=int, default=1, help="Test images of each edit.")
    arguments = parser.parse_args()
    disable_malloc_trim()
    base = load_diffusion_base(pretrained.EDIT_BASE_DIR)
    edits = load_edit_benchmark(arguments.folder, base.resolution).edits
    benchmark = EditBenchmark(
        tuple(replace(edit, test_pairs=edit.test_pairs[: arguments.num_images]) for edit in edits)
    )
    classifier = AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR)
    model = PairToLora.from_pretrained(arguments.model, base=base)
    loras, _ = generate_pair_loras(model, benchmark, 1)
    for num_steps in arguments.steps:
        evaluator = EditEvaluator(base, classifier, benchmark, num_steps)
        for strength in arguments.strengths:
            name = f"{num_steps} steps, strength {strength:g}"
            result = evaluator.evaluate(name, loras * strength)
            cells = [f"{metric} {result.compute_score(metric, GROUP)}" for metric in METRICS]
            print(name, *cells, sep="   ")


if __name__ == "__main__":
    main()
