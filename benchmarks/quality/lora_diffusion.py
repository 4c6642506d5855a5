"""What codecs keep of held-out LoRAs, and what a diffusion model over LoRAs makes of one photo of held-out people.

    data-builder run runs/avatars/build; data-builder run runs/avatars/build-validation
    data-builder components runs/avatars/build -o runs/avatars/lora-components
    hyperlora train fit --config configs/avatars/lora_codec.yaml
    hyperlora train fit --config configs/avatars/difflora.yaml
    python benchmarks/difflora.py runs/avatars/build runs/avatars/build-validation \
        --codecs runs/avatars/lora-components runs/avatars/lora-codec --components 128 \
        --model runs/avatars/difflora/model [--sampling-steps 1 4 10 50] [--people 16]

I *of the fitted* is the share of the I that the LoRAs have as they were fitted. *Nearest of training* is the mean
cosine of each LoRA's numbers (normalised by the training set) to the nearest training LoRA's: samples nearer than
held-out fitted LoRAs would be copies. *Spread* is 1 - the mean cosine between samples of one photo.
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "dataset", type=Path, help="Build or pack that codecs and model were trained on."
    )
    parser.add_argument("held_out", type=Path, help="Build of other people.")
    parser.add_argument("--split", default="validation", help="Of the held-out build.")
    parser.add_argument("--codecs", nargs="*", default=[])
    parser.add_argument(
        "--components", type=int, nargs="*", default=[], help="Also plain ones, so many."
    )
    parser.add_argument("--model", nargs="*", default=[], help="Models from photos, of any method.")
    parser.add_argument("--sampling-steps", type=int, nargs="+", default=[1, 4, 10, 50])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--people", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="Of drawing.")
    arguments = parser.parse_args()
    disable_malloc_trim()
    base = load_diffusion_base(pretrained.BASE_DIR)
    reader = AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR)
    prompts = load_benchmark(pretrained.BENCHMARK_DIR, base.resolution, 1).prompts[
        : arguments.prompts
    ]

    def make_evaluator(benchmark: Benchmark) -> SubjectEvaluator:
        return SubjectEvaluator(base, reader, benchmark, arguments.steps)

    evaluation = make_held_out_evaluation(
        arguments.dataset,
        arguments.held_out,
        make_evaluator,
        prompts,
        base.resolution,
        arguments.people,
        arguments.split,
    )
    baseline = evaluation.evaluate_original()
    rows = [baseline]
    for name in arguments.codecs:
        rows.append(
            evaluation.evaluate_codec(Path(name).name, LoraCodec.from_pretrained(name), baseline)
        )
    for count in arguments.components:
        codec = LoraCodec.fit_pca(LoraDataset(arguments.dataset, "train"), 1, count)
        rows.append(evaluation.evaluate_codec(f"{count} principal components", codec, baseline))
    rows += [
        row
        for name in arguments.model
        for row in _sample_loras(evaluation, name, baseline, arguments)
    ]
    print(*format_table(rows), sep="\n")


def _sample_loras(
    evaluation: HeldOutEvaluation, name: str, baseline: CodecResult, arguments: argparse.Namespace
) -> list[CodecResult]:
    model = load_image_to_lora(name, base=evaluation.evaluator.base)
    if not model.is_generative:
        return [
            evaluation.evaluate_sampler(f"{name}, one photo", model, baseline, LoraSampling(), 1)
        ]
    return [
        evaluation.evaluate_sampler(
            f"{name}, one photo, {n} steps, guidance {g:g}",
            model,
            baseline,
            LoraSampling(0, n, g),
        )
        for n in arguments.sampling_steps
        for g in arguments.guidance
    ]


if __name__ == "__main__":
    main()
