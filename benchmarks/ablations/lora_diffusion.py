"""Parts of a diffusion over LoRAs (DiffLoRA), trained for equally many steps, side by side.

    data-builder run runs/avatars/teachers; data-builder run runs/avatars/teachers-validation
    data-builder run runs/avatars/build
    python -m benchmarks.ablations.lora_diffusion runs/avatars/teachers-validation
        --dataset "from scratch" runs/avatars/teachers --dataset predictions runs/avatars/build
        [--codecs pca autoencoder] [--mixtures gate face image] [--steps 2000]
        [--one-photo-build runs/avatars/teachers-one-photo] [-o runs/ablations/lora-diffusion]

Every dataset has LoRAs of the same subjects. *Codecs* are principal components and the
convolutional autoencoder, fitted to each dataset. *Mixtures* are DiffLoRA's gate between face and
image features, and either kind of features alone. All models see photos, and copies with a part
covered. What is finished in the output folder is not trained again.

Scores are of held-out subjects, one photo each, whole and with a part covered. Best of 4 is chosen
by the face pack, which takes no part in scoring. Differences are paired by subject.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
import yaml
from torch import Tensor

from benchmarks.ablations.codec_heldout import (
    CodecResult,
    HeldOutEvaluation,
    format_table,
    make_held_out_evaluation,
)
from benchmarks.ablations.lora_diffusion_training import (
    CODECS,
    Settings,
    Variant,
    fit_codec,
    train_models,
)
from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.metrics import Score
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.image_feature_mixer import GATE_MODES
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.face_similarity import FaceSimilarity
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.pipelines.lora_diffusion import LoraDiffusion
from hyperlora.pipelines.rerank import IdentityReranker, make_scoring_prompts
from hyperlora.training.augmentation import occlude_image

NUM_CANDIDATES: Final = 4


def main() -> None:
    """Parse the command line, train what is missing and print the tables."""
    arguments = _parse_arguments()
    disable_malloc_trim()
    settings = _read_settings(arguments)
    datasets = dict(arguments.dataset)
    evaluation = _make_evaluation(arguments, next(iter(datasets.values())))
    variants = [
        Variant(dataset, codec, mixture)
        for dataset in datasets
        for codec in arguments.codecs
        for mixture in arguments.mixtures
    ]
    codec_dirs = {
        (dataset, codec): fit_codec(settings, dataset, Path(folder), codec)
        for dataset, folder in datasets.items()
        for codec in arguments.codecs
    }
    train_models(settings, variants, {k: Path(v) for k, v in datasets.items()}, codec_dirs)

    original = evaluation.evaluate_original()
    rows = [original]
    for (dataset, codec_name), codec_dir in codec_dirs.items():
        codec = LoraCodec.from_pretrained(codec_dir)
        rows.append(evaluation.evaluate_codec(f"{dataset}, {codec_name}", codec, original))
    if arguments.one_photo_build is not None:
        rows.append(_evaluate_one_photo_loras(evaluation, arguments.one_photo_build, original))
    whole, occluded = {}, {}
    differences = list[str]()
    for variant in variants:
        model = LoraDiffusion.from_pretrained(settings.output_dir / variant.folder_name)
        photos = evaluation.evaluator.benchmark.photos[:, :1]
        sampling = LoraSampling(0, arguments.sampling_steps, arguments.guidance_scale)
        num_samples = NUM_CANDIDATES if variant.mixture == "gate" else 1
        samples = sample_loras(model, photos, sampling, num_samples)
        whole[variant] = evaluation.evaluate_samples(variant.name, samples, original)
        occluded[variant] = evaluation.evaluate_samples(
            f"{variant.name}, part covered",
            sample_loras(model, _occlude_photos(photos), sampling, 1),
            original,
        )
        rows += [whole[variant], occluded[variant]]
        if variant.mixture == "gate":
            best = _evaluate_best(evaluation, model, samples, variant, original, arguments)
            rows.append(best)
            differences.append(_format_difference(best, whole[variant]))
    print(*format_table(rows), sep="\n")
    for results in (whole, occluded):
        differences += _compare_mixtures(results)
    print("", *differences, sep="\n")


def sample_loras(
    model: LoraDiffusion, photos: Tensor, sampling: LoraSampling, num_samples: int
) -> list[LoraWeights]:
    """Sample LoRAs from photos; a photo without a face is no error.

    Args:
        model: The model.
        photos: Photos of each subject [subjects, views, 3, h, w] in [0, 1].
        sampling: Steps and guidance; each sample has a seed of its own.
        num_samples: Samples of each subject.

    Returns:
        ``num_samples`` times one LoRA per subject.
    """
    features = [model.encode_photos(photo[None], allow_no_face=True) for photo in photos]
    return [
        LoraWeights.stack(
            [
                model.generate_from_features(f, replace(sampling, seed=i * len(photos) + j))[0]
                for j, f in enumerate(features)
            ]
        )
        for i in range(num_samples)
    ]


def _evaluate_best(
    evaluation: HeldOutEvaluation,
    model: LoraDiffusion,
    samples: Sequence[LoraWeights],
    variant: Variant,
    original: CodecResult,
    arguments: argparse.Namespace,
) -> CodecResult:
    """Evaluate the sample of each subject that the face pack ranks first."""
    evaluator = evaluation.evaluator
    reranker = IdentityReranker(
        evaluator.base,
        FaceSimilarity.from_pack(arguments.face_pack, evaluator.base.resolution),
        make_scoring_prompts(model.trigger_phrase),
    )
    best = []
    for i, photos in enumerate(evaluator.benchmark.photos[:, :1]):
        candidates = LoraWeights.stack([sample[i] for sample in samples])
        best.append(candidates[int(reranker(candidates, photos).argmax())])
    name = f"{variant.name}, best of {len(samples)}"
    return evaluation.evaluate_samples(name, [LoraWeights.stack(best)], original)


def _evaluate_one_photo_loras(
    evaluation: HeldOutEvaluation, build: Path, original: CodecResult
) -> CodecResult:
    """Evaluate LoRAs that were fitted to the first photo alone."""
    data = LoraDataset(build)
    names = evaluation.evaluator.benchmark.names
    loras = data.get_weights([data.list_subject_rows(name)[0] for name in names])
    return evaluation.evaluate_samples("fitted to the one photo", [loras], original)


def _compare_mixtures(results: dict[Variant, CodecResult]) -> list[str]:
    """Sentences: the gate above the best single expert of the same dataset and codec."""
    sentences = []
    for variant, result in results.items():
        experts = [
            results[expert]
            for mode in ("face", "image")
            if (expert := replace(variant, mixture=mode)) in results
        ]
        if variant.mixture == "gate" and experts:
            best = max(experts, key=lambda expert: expert.scores.identity.mean)
            sentences.append(_format_difference(result, best))
    return sentences


def _format_difference(result: CodecResult, other: CodecResult) -> str:
    """Sentence: identity of a row above another's, paired by subject."""
    difference: Score = result.scores.identity.compute_paired_difference(other.scores.identity)
    return (
        f"{result.scores.name} above {other.scores.name}: "
        f"{difference.mean:+.3f} ± {difference.standard_error:.3f}"
    )


def _occlude_photos(photos: Tensor) -> Tensor:
    """Cover a part of each photo [subjects, 1, 3, h, w], the same in every run."""
    return torch.stack(
        [
            occlude_image(photo[0], np.random.default_rng([1, i]))[None]
            for i, photo in enumerate(photos)
        ]
    )


def _make_evaluation(arguments: argparse.Namespace, train_dir: str) -> HeldOutEvaluation:
    base = load_diffusion_base(pretrained.BASE_DIR)
    benchmark = load_benchmark(pretrained.BENCHMARK_DIR, base.resolution, 1)
    classifier = AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR)
    return make_held_out_evaluation(
        Path(train_dir),
        arguments.held_out,
        lambda held_out: SubjectEvaluator(
            base, classifier, held_out, arguments.num_inference_steps
        ),
        benchmark.prompts[: arguments.num_prompts],
        base.resolution,
        arguments.num_subjects,
    )


def _read_settings(arguments: argparse.Namespace) -> Settings:
    config = yaml.safe_load(arguments.config.read_text())
    codec_config = yaml.safe_load(arguments.codec_config.read_text())
    needs_faces = arguments.mixtures != ["image"]
    return Settings(
        config["model"]["init_args"]
        | {
            "encoder": str(arguments.encoder),
            "face_pack": str(arguments.face_pack) if needs_faces else None,
        }
        | ({"regression_rank": None} if arguments.no_regression else {}),
        codec_config["model"]["init_args"],
        config["data"]["init_args"],
        codec_config["data"]["init_args"],
        {
            "num_tokens": arguments.pca_tokens,
            "latent_width": arguments.pca_width,
            "components_per_factor": arguments.pca_directions,
        },
        arguments.steps,
        arguments.codec_steps,
        arguments.output,
    )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("held_out", type=Path, help="Build of other subjects.")
    parser.add_argument(
        "--dataset", nargs=2, action="append", required=True, metavar=("NAME", "FOLDER")
    )
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=CODECS)
    parser.add_argument(
        "--mixtures", nargs="+", default=["gate", "face", "image"], choices=GATE_MODES
    )
    parser.add_argument(
        "--one-photo-build", type=Path, help="Build of the held-out subjects from one photo each."
    )
    parser.add_argument(
        "--config", type=Path, default=Path("configs/avatars/ablations/difflora.yaml")
    )
    parser.add_argument(
        "--codec-config",
        type=Path,
        default=Path("configs/avatars/ablations/difflora_autoencoder.yaml"),
    )
    parser.add_argument("--pca-tokens", type=int, default=8, help="Tokens of principal components.")
    parser.add_argument("--pca-width", type=int, default=16, help="Components of a token.")
    parser.add_argument("--pca-directions", type=int, default=8, help="Components per factor.")
    parser.add_argument(
        "--encoder", type=Path, default=pretrained.IMAGE_TO_LORA_DIR, help="Encoder of the photos."
    )
    parser.add_argument("--face-pack", type=Path, default=pretrained.FACE_PACK_DIR)
    parser.add_argument("--no-regression", action="store_true", help="Train the transformer alone.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--codec-steps", type=int, default=400)
    parser.add_argument("--num-subjects", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--sampling-steps", type=int, default=4)
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="Of a LoRA.")
    parser.add_argument("--num-inference-steps", type=int, default=10, help="Of an image.")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/ablations/lora-diffusion"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
