"""Codecs on held-out LoRAs, and LoRAs that models generate from one photo of held-out subjects.

    data-builder run runs/avatars/build; data-builder run runs/avatars/build-validation
    data-builder fit-pca runs/avatars/build -o runs/avatars/lora-components
    hyperlora train fit --config configs/avatars/12_lora_diffusion.yaml
    python -m benchmarks.quality.lora_diffusion runs/avatars/build runs/avatars/build-validation
        --codecs runs/avatars/lora-components
        --num-components 128 --model runs/avatars/12_lora_diffusion/model
        [--sampling-steps 1 4 10 50] [--num-subjects 16]

*Identity retention* is the identity score relative to that of the fine-tuned LoRAs. *Max train
cosine* is the mean cosine of each LoRA (normalized by the training set) to the nearest training
LoRA. Samples nearer than held-out fine-tuned LoRAs would be copies. *Sample diversity* is 1 - the
mean cosine between samples of one photo.
"""

import argparse
from pathlib import Path

from benchmarks.ablations.codec_heldout import (
    CodecResult,
    HeldOutEvaluation,
    format_table,
    make_held_out_evaluation,
)
from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.benchmark import Benchmark, load_benchmark
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
from hyperlora.pipelines.auto import load_image_to_lora
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.lora_codec import LoraCodec


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("dataset", type=Path, help="Build or pack that all were trained on.")
    parser.add_argument("held_out", type=Path, help="Build of other subjects.")
    parser.add_argument("--split", default="validation", help="Split of the held-out build.")
    parser.add_argument("--codecs", nargs="*", default=[])
    parser.add_argument(
        "--num-components", type=int, nargs="*", default=[], help="Also PCA with so many."
    )
    parser.add_argument("--model", nargs="*", default=[], help="Models from photos to LoRAs.")
    parser.add_argument("--sampling-steps", type=int, nargs="+", default=[1, 4, 10, 50])
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[1.0])
    parser.add_argument("--num-subjects", type=int, default=16)
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--num-inference-steps", type=int, default=10, help="Of an image.")
    arguments = parser.parse_args()
    disable_malloc_trim()
    base = load_diffusion_base(pretrained.BASE_DIR)
    classifier = AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR)
    benchmark = load_benchmark(pretrained.BENCHMARK_DIR, base.resolution, 1)

    def make_evaluator(benchmark: Benchmark) -> SubjectEvaluator:
        return SubjectEvaluator(base, classifier, benchmark, arguments.num_inference_steps)

    evaluation = make_held_out_evaluation(
        arguments.dataset,
        arguments.held_out,
        make_evaluator,
        benchmark.prompts[: arguments.num_prompts],
        base.resolution,
        arguments.num_subjects,
        arguments.split,
    )
    original = evaluation.evaluate_original()
    results = [original]
    for folder in arguments.codecs:
        codec = LoraCodec.from_pretrained(folder)
        results.append(evaluation.evaluate_codec(Path(folder).name, codec, original))
    for num_components in arguments.num_components:
        codec = LoraCodec.fit_pca(LoraDataset(arguments.dataset, "train"), 1, num_components)
        name = f"{num_components} principal components"
        results.append(evaluation.evaluate_codec(name, codec, original))
    for folder in arguments.model:
        results += evaluate_model(evaluation, folder, original, arguments)
    print(*format_table(results), sep="\n")


def evaluate_model(
    evaluation: HeldOutEvaluation,
    folder: str,
    original: CodecResult,
    arguments: argparse.Namespace,
) -> list[CodecResult]:
    """Evaluate the LoRAs of a model from one photo, at all sampling steps and guidance scales.

    Args:
        evaluation: Held-out subjects.
        folder: Folder of the model.
        original: Result of the fine-tuned LoRAs.
        arguments: Arguments of the command line.

    Returns:
        One result per setting; a single one if the model is deterministic.
    """
    model = load_image_to_lora(folder, base=evaluation.evaluator.base)
    if not model.is_generative:
        return [
            evaluation.evaluate_sampler(f"{folder}, one photo", model, original, LoraSampling(), 1)
        ]
    return [
        evaluation.evaluate_sampler(
            f"{folder}, one photo, {num_steps} steps, guidance {guidance_scale:g}",
            model,
            original,
            LoraSampling(0, num_steps, guidance_scale),
        )
        for num_steps in arguments.sampling_steps
        for guidance_scale in arguments.guidance_scale
    ]


if __name__ == "__main__":
    main()
