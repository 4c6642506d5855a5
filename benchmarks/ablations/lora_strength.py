"""Which strength a hypernetwork's LoRAs should have, on validation people: its ``card["strength"]``.

python -m data_builder benchmark -o runs/data/benchmark-validation --split validation --people 16
python benchmarks/choose_strength.py runs/data/benchmark-validation [--model DIR] [--people 12]
"""

import argparse
from pathlib import Path

import torch

from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.report import format_markdown
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
from hyperlora.pipelines.image_to_lora import ImageToLora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("--model", default=pretrained.IMAGE_TO_LORA_DIR)
    parser.add_argument("--people", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 1.25, 1.5, 1.75])
    arguments = parser.parse_args()
    disable_malloc_trim()
    base = load_diffusion_base(pretrained.BASE_DIR)
    model = ImageToLora.from_pretrained(arguments.model, base=base)
    benchmark = load_benchmark(arguments.benchmark, base.resolution, arguments.people)
    judge = SubjectEvaluator(
        base,
        AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR),
        benchmark,
        num_inference_steps=arguments.steps,
    )
    with torch.no_grad():
        loras = model.forward(benchmark.photos[:, :1]) * (
            1 / model.card.strength
        )
    rows = [judge.evaluate("no LoRA", loras * 0.0)]
    rows += [judge.evaluate(f"strength {s:g}", loras * s) for s in arguments.strengths]
    print(format_markdown(rows))


if __name__ == "__main__":
    main()
