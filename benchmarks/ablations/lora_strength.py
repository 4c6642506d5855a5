"""Strength of a hypernetwork's LoRAs (``ModelCard.strength``), on validation subjects.

data-builder write-benchmark -o runs/data/benchmark-validation --split validation --num-subjects 16
python -m benchmarks.ablations.lora_strength runs/data/benchmark-validation [--model DIR]
    [--num-subjects 12]
"""

import argparse
from pathlib import Path

import torch

from benchmarks.avatar_evaluator import load_subject_evaluator
from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.evaluation.report import format_markdown
from hyperlora.pipelines.image_to_lora import ImageToLora


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("--model", default=pretrained.IMAGE_TO_LORA_DIR)
    parser.add_argument("--num-subjects", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 1.25, 1.5, 1.75])
    arguments = parser.parse_args()
    disable_malloc_trim()
    evaluator = load_subject_evaluator(arguments.benchmark, arguments.num_subjects, arguments.steps)
    model = ImageToLora.from_pretrained(arguments.model, base=evaluator.base)
    with torch.no_grad():
        loras = model.forward(evaluator.benchmark.photos[:, :1]) * (1 / model.card.strength)
    results = [evaluator.evaluate("no LoRA", loras * 0.0)]
    results += [
        evaluator.evaluate(f"strength {strength:g}", loras * strength)
        for strength in arguments.strengths
    ]
    print(format_markdown(results))


if __name__ == "__main__":
    main()
