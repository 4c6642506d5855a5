"""Steps and strength of edits, chosen on validation people: what becomes the default and the model's card.

python -m data_builder edit-benchmark -o runs/data/edits-validation-benchmark --split validation --each 2
python benchmarks/choose_edit.py runs/data/edits-validation-benchmark [--steps 2 4 8 20] [--strengths 1 1.3]
"""

import argparse
from dataclasses import replace

from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.edit_benchmark import load_edit_benchmark
from hyperlora.evaluation.edit_evaluator import EditEvaluator
from hyperlora.evaluation.edit_suite import generate_pair_loras
from hyperlora.pipelines.pair_to_lora import PairToLora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--model", default=pretrained.PAIR_TO_LORA_DIR)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8, 20])
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 1.3])
    parser.add_argument("--pictures", type=int, default=1, help="Of each edit.")
    arguments = parser.parse_args()
    disable_malloc_trim()
    base = load_diffusion_base(pretrained.EDIT_BASE_DIR)
    full_benchmark = load_edit_benchmark(arguments.folder, base.resolution)
    benchmark = replace(
        full_benchmark,
        edits=tuple(
            replace(e, others=e.test_pairs[: arguments.pictures]) for e in full_benchmark.edits
        ),
    )
    reader = AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR)
    lora, _ = generate_pair_loras(
        PairToLora.from_pretrained(arguments.model, base=base), benchmark, 1
    )
    for steps in arguments.steps:
        judge = EditEvaluator(base, reader, benchmark, steps)
        for strength in arguments.strengths:
            row = judge.evaluate(f"{steps} steps, strength {strength:g}", lora * strength)
            scores = {
                m: row.compute_score(m, "seen kinds")
                for m in ("accuracy", "preservation", "made", "psnr")
            }
            print(row.name, *(f"{name} {score}" for name, score in scores.items()), sep="   ")


if __name__ == "__main__":
    main()
