"""Photos of subjects to finished LoRAs, and one subject's to files."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.images import read_image
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.negative_lora import make_negative_path
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.config import GenerationConfig, LoraSampling
from hyperlora.pipelines.lora_files import serialize_lora_files
from hyperlora.pipelines.photo_model import AnyPhotoModel, FeaturesT, PhotoModel, SubjectPhotos
from hyperlora.pipelines.refine_generated import check_refine_method, refine_predictions
from hyperlora.pipelines.rerank import IdentityReranker
from hyperlora.seeds import compute_seed


@dataclass(frozen=True)
class GenerationRecord:
    """One line of the index of generated files.

    Attributes:
        subject: The name of the subject; empty where ``error`` names it.
        file: The name of its file; None if there is none.
        num_photos: Photos that the LoRA is generated from.
        seconds: The time per LoRA.
        error: Why a photo was skipped or there is no file.
        config_hash: A hash of the model and the settings; empty if there is no file.
        warnings: What may be wrong with the photos, a sentence each.
        negative_file: The name of the file for the negative branch of guidance; None for none.
    """

    subject: str
    file: str | None
    num_photos: int
    seconds: float
    error: str | None = None
    config_hash: str = ""
    warnings: Sequence[str] = field(default_factory=list)
    negative_file: str | None = None


def generate_loras(
    model: PhotoModel[FeaturesT],
    subjects: Sequence[SubjectPhotos],
    config: GenerationConfig,
    base: DiffusionBase | None = None,
    features: FeaturesT | None = None,
    reranker: IdentityReranker | None = None,
) -> LoraWeights:
    """Generate the LoRAs of several subjects, refined, resized and scaled.

    Args:
        model: The model.
        subjects: Subjects with equally many photos each.
        config: The settings; ``num_loras`` is 1 here.
        base: The base, for refinement.
        features: The encoded photos, where they are encoded already.
        reranker: Ranks the candidates if ``num_candidates`` is more than 1.

    Returns:
        One LoRA per subject (batch axis).

    Raises:
        InvalidArgumentError: The settings do not suit the model, or the base or the reranker that
            they need is missing.
    """
    validate_config(model, config)
    photo_features = features if features is not None else model.encode_subjects(subjects)
    (weights,) = generate_candidates(
        model, photo_features, subjects, replace(config, num_loras=1), reranker
    )
    return postprocess_loras(model, weights, subjects, config, base)


def validate_config(model: AnyPhotoModel, config: GenerationConfig) -> None:
    """Check that settings suit a model.

    Args:
        model: The model.
        config: The settings.

    Raises:
        InvalidArgumentError: No target can have the rank, the model is deterministic and several
            samples or a seed are given, or the model cannot be refined by the method.
    """
    check_refine_method(model, config.refine_method)
    if config.rank is not None:
        model.layout.check_rank(config.rank)
    num_samples = max(config.num_loras, config.num_candidates)
    if not model.is_generative and (num_samples > 1 or config.sampling != LoraSampling()):
        raise InvalidArgumentError(
            "this model is deterministic and makes one LoRA of a photo: num-loras, num-candidates, "
            "seed, lora-sampling-steps and lora-guidance-scale are for a model that samples "
            "(--method lora-diffusion)"
        )


@torch.no_grad()
def generate_candidates(
    model: PhotoModel[FeaturesT],
    features: FeaturesT,
    subjects: Sequence[SubjectPhotos],
    config: GenerationConfig,
    reranker: IdentityReranker | None = None,
) -> list[LoraWeights]:
    """Generate ``num_loras`` LoRAs of every subject, the best of ``num_candidates`` if more.

    Args:
        model: The model.
        features: The encoded photos.
        subjects: The photos, for the reranker.
        config: The settings; candidate i has the seed ``config.sampling.seed + i``.
        reranker: Ranks the candidates of each subject.

    Returns:
        ``num_loras`` batches with one LoRA per subject: by seed, or reranked, the best first.

    Raises:
        InvalidArgumentError: There are more candidates than LoRAs, and no reranker.
    """
    num_candidates = max(config.num_loras, config.num_candidates)
    candidates = [
        model.generate_from_features(
            features, replace(config.sampling, seed=compute_seed(config.sampling.seed, i))
        )
        for i in range(num_candidates)
    ]
    if num_candidates == 1 or (reranker is None and not config.needs_reranking):
        return candidates
    if reranker is None:
        raise InvalidArgumentError(
            "choosing the best of several LoRAs generates images with the base model: give it too"
        )
    rankings = []  # per subject, candidates from the best
    for i, photos in enumerate(subjects):
        pixels = photos.encoder_pixels if photos.base_pixels is None else photos.base_pixels
        assert pixels is not None  # the reranker has a base
        scores = reranker(LoraWeights.stack([lora[i] for lora in candidates]), pixels)
        rankings.append(scores.argsort(descending=True).tolist())
    return [
        LoraWeights.stack([candidates[ranking[position]][i] for i, ranking in enumerate(rankings)])
        for position in range(config.num_loras)
    ]


@torch.no_grad()
def predict_loras(
    model: PhotoModel[FeaturesT], features: FeaturesT, sampling: LoraSampling | None = None
) -> LoraWeights:
    """Generate LoRAs from encoded photos without gradients, as ``generate_from_features``.

    Args:
        model: The model.
        features: The encoded photos.
        sampling: Seed and steps of a model that ``is_generative``.

    Returns:
        One LoRA per subject (batch axis).
    """
    return model.generate_from_features(features, sampling)


@torch.no_grad()
def generate_negatives(
    model: PhotoModel[FeaturesT], features: FeaturesT, config: GenerationConfig
) -> LoraWeights | None:
    """Generate the LoRAs of the negative branch of guidance, resized and scaled as the others.

    Args:
        model: The model.
        features: The encoded photos.
        config: The settings; the negative branch is never refined.

    Returns:
        One LoRA per subject (batch axis), on the CPU; None for a model without such LoRAs.
    """
    weights = model.generate_negative(features)
    if weights is None:
        return None
    return postprocess_loras(model, weights, (), config.drop_refinement()).to("cpu")


def postprocess_loras(
    model: AnyPhotoModel,
    weights: LoraWeights,
    subjects: Sequence[SubjectPhotos],
    config: GenerationConfig,
    base: DiffusionBase | None = None,
    on_step: Callable[[int], None] | None = None,
) -> LoraWeights:
    """Refine, resize and scale generated LoRAs.

    Args:
        model: The model that generated them.
        weights: One LoRA per subject (batch axis).
        subjects: The photos, for refinement.
        config: The settings.
        base: The base, for refinement.
        on_step: Called with the number of each refinement step; without it there is a progress bar.

    Returns:
        The finished LoRAs (batch axis).

    Raises:
        InvalidArgumentError: There are steps of refinement and no base.
    """
    if config.refine_steps:
        if base is None:
            raise InvalidArgumentError("refinement runs the base model: give it too")
        pixels = [photos.base_pixels for photos in subjects if photos.base_pixels is not None]
        weights = refine_predictions(
            model,
            base,
            weights,
            stack_views(pixels),  # [batch, views, 3, h, w]
            num_steps=config.refine_steps,
            out_rank=config.rank,
            method=config.refine_method,
            on_step=on_step,
            progress_label=None if on_step else "refining",
        )
    elif config.rank is not None and config.rank != weights.layout.rank:
        weights = weights.resize(config.rank)
    return weights * config.strength if config.strength != 1 else weights


def stack_views(photos: Sequence[Tensor]) -> Tensor:
    """Stack the photos of several subjects; those of a subject with fewer are repeated.

    Args:
        photos: [views, 3, h, w] of each subject, at least one photo each.

    Returns:
        [subjects, views, 3, h, w] with the most views of any.
    """
    num_views = max(len(views) for views in photos)
    return torch.stack([views[torch.arange(num_views) % len(views)] for views in photos])


def generate_files(
    model: AnyPhotoModel,
    photo_paths: Sequence[Path],
    output_path: Path,
    config: GenerationConfig,
    base: DiffusionBase | None = None,
    preloaded_images: Sequence[Image.Image] | None = None,
    reranker: IdentityReranker | None = None,
) -> list[GenerationRecord]:
    """Generate the LoRAs of one subject and write them; nothing is written if one fails.

    Args:
        model: The model.
        photo_paths: The photos of the subject.
        output_path: The file, numbered if ``config.num_loras`` is more than 1.
        config: The settings.
        base: The base, for refinement.
        preloaded_images: The photos, where they are decoded already.
        reranker: Ranks the candidates.

    Returns:
        One record per file.

    Raises:
        InvalidImageError: A photo cannot be read.
        InvalidArgumentError: As ``generate_loras``.
    """
    start_time = time.perf_counter()
    validate_config(model, config)
    images = preloaded_images
    if images is None:
        images = [read_image(path) for path in photo_paths]
    pixel_base = base or (reranker.base if reranker else None)
    subjects = [SubjectPhotos.from_images(images, model, pixel_base)]
    features = model.encode_subjects(subjects)
    samples = generate_candidates(model, features, subjects, config, reranker)
    loras = [
        postprocess_loras(model, weights, subjects, config, base)[0].to("cpu")
        for weights in samples
    ]
    negatives = generate_negatives(model, features, config)
    (warnings,) = model.list_warnings(features)
    seconds = (time.perf_counter() - start_time) / config.num_loras
    output_paths = make_numbered_paths(output_path, config.num_loras)
    for weights, path in zip(loras, output_paths, strict=True):
        files = serialize_lora_files(
            model,
            weights,
            None if negatives is None else negatives[0],
            photo_paths,
            (path.stem, path.stem),
            config.format,
        )
        files.write(path)
    return [
        GenerationRecord(
            path.stem,
            path.name,
            len(photo_paths),
            seconds,
            warnings=warnings,
            negative_file=None if negatives is None else make_negative_path(path).name,
        )
        for path in output_paths
    ]


def make_numbered_paths(path: Path, num_files: int) -> list[Path]:
    """Number the files of several LoRAs.

    Args:
        path: The path of a single file.
        num_files: How many files there are.

    Returns:
        ``path`` alone for one file; ``me-1.safetensors``, ``me-2.safetensors``, ... for several.
    """
    if num_files == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(num_files)]
