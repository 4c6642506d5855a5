"""Photos of subjects to finished LoRAs, and one subject's to files."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.images import compute_sha256, read_image, to_tensor
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase, SamplingConfig
from hyperlora.pipelines.input_checks import check_photos
from hyperlora.pipelines.refine_generated import (
    RefineMethod,
    check_refine_method,
    refine_predictions,
)
from hyperlora.pipelines.rerank import IdentityReranker

LoraFormat = Literal["diffusers", "kohya", "sgm"]


@dataclass(frozen=True)
class GenerationConfig:
    """How LoRAs are made and written. ``rank`` None keeps the model's; ``refine_steps`` counts fine-tuning steps, which need
    a ``base``, and ``refine_method`` is ``refine_predictions``'s ``by``. A model that samples makes ``num_candidates`` LoRAs of each subject,
    which need a ``IdentityReranker`` if more than are asked for."""

    format: LoraFormat = "diffusers"
    rank: int | None = None
    strength: float = 1.0
    refine_steps: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    num_candidates: int = 1
    refine_method: RefineMethod | None = None


@dataclass(frozen=True)
class SubjectPhotos:
    """One subject's photos, decoded once: ``encoder_pixels`` [views, 3, size, size] by the model and, for refining, ``base_pixels``
    [views, 3, resolution, resolution] as the base would draw them."""

    encoder_pixels: Tensor
    base_pixels: Tensor | None = None

    @classmethod
    def from_images(
        cls,
        images: Sequence[Image.Image],
        model: ImageToLoraBase,
        base: DiffusionBase | None = None,
    ) -> "SubjectPhotos":
        encoder_pixels = torch.stack([to_tensor(image, model.photo_size) for image in images])
        return cls(
            encoder_pixels,
            torch.stack([to_tensor(image, base.resolution) for image in images]) if base else None,
        )

    @classmethod
    def cat(cls, parts: Sequence["SubjectPhotos"]) -> "SubjectPhotos":
        """Photos of one subject that were decoded apart."""
        base_pixels = [part.base_pixels for part in parts if part.base_pixels is not None]
        return cls(
            torch.cat([part.encoder_pixels for part in parts]),
            torch.cat(base_pixels) if base_pixels else None,
        )


@dataclass(frozen=True)
class GenerationRecord:
    """One line of the index: the subject, its file, or why there is none; ``config_hash`` tells model and settings apart,
    ``warnings`` say what may be wrong with the photos."""

    subject: str
    file: str | None
    num_photos: int
    seconds: float
    error: str | None = None
    config_hash: str = ""
    warnings: Sequence[str] = field(default_factory=list)


def generate_loras(
    model: ImageToLoraBase,
    subjects: Sequence[SubjectPhotos],
    config: GenerationConfig,
    base: DiffusionBase | None = None,
    features: Any = None,
    reranker: IdentityReranker | None = None,
) -> LoraWeights:
    """LoRAs (batch axis) of subjects with equally many photos each, refined and resized as asked; ``features`` are
    those of their photos where the encoder has seen them already.

    Raises ``InvalidArgumentError`` for refining without a base, choosing without a ``reranker``, a rank that no site can fill, and
    several samples of a model that makes one LoRA.
    """
    validate_config(model, config)
    photo_features = features if features is not None else encode_subjects(model, subjects)
    (weights,) = generate_candidates(model, photo_features, subjects, config, 1, reranker)
    return postprocess_loras(model, weights, subjects, config, base)


def validate_config(model: ImageToLoraBase, config: GenerationConfig, num_samples: int = 1) -> None:
    """Raises ``InvalidArgumentError`` for a rank that no site can fill, for samples of a model that makes one LoRA, and for a way
    to refine that the model does not know."""
    check_refine_method(model, config.refine_method)
    rank = config.rank or model.layout.rank
    if rank > (
        max_rank := max(min(site.in_features, site.out_features) for site in model.layout.targets)
    ):
        raise InvalidArgumentError(
            f"rank {rank} asked for, but no weight of {model.layout.base!r} has more than {max_rank}"
        )
    if not model.is_generative and (
        max(num_samples, config.num_candidates) > 1 or config.sampling != SamplingConfig()
    ):
        raise InvalidArgumentError(
            "this model makes one LoRA of a photo and leaves nothing to chance: n, best-of, seed, sampling steps and "
            "guidance are for a model that samples (--method difflora)"
        )


@torch.no_grad()
def generate_candidates(
    model: ImageToLoraBase,
    features: Any,
    subjects: Sequence[SubjectPhotos],
    config: GenerationConfig,
    num_loras: int,
    reranker: IdentityReranker | None = None,
) -> list[LoraWeights]:
    """``count`` LoRAs of every subject, each of batch subjects, by the seeds from the settings' on; of more
    (``num_candidates``), those that ``reranker`` finds most like the photos, the likest first."""
    num_candidates, sampling = max(num_loras, config.num_candidates), config.sampling
    candidates = [
        model.generate_from_features(features, replace(sampling, seed=sampling.seed + i))
        for i in range(num_candidates)
    ]
    if num_candidates == 1 or (reranker is None and num_candidates == num_loras):
        return candidates
    if reranker is None:
        raise InvalidArgumentError(
            "choosing the best of several LoRAs draws with the base model: give it too"
        )
    similarities = [
        reranker(
            LoraWeights.stack([lora[i] for lora in candidates]),
            photos.encoder_pixels if photos.base_pixels is None else photos.base_pixels,
        )
        for i, photos in enumerate(subjects)
    ]
    rankings = [scores.argsort(descending=True).tolist() for scores in similarities]
    return [
        LoraWeights.stack([candidates[ranking[position]][i] for i, ranking in enumerate(rankings)])
        for position in range(num_loras)
    ]


def encode_subjects(model: ImageToLoraBase, subjects: Sequence[SubjectPhotos]) -> Any:
    """What the encoder says about subjects with equally many photos each."""
    return model.encode_photos(
        torch.stack([photos.encoder_pixels for photos in subjects]).to(model.device)
    )


@torch.no_grad()
def predict_loras(
    model: ImageToLoraBase, features: Any, sampling: SamplingConfig | None = None
) -> LoraWeights:
    """The one forward pass, after the encoder: LoRAs (batch axis)."""
    return model.generate_from_features(features, sampling)


def postprocess_loras(
    model: ImageToLoraBase,
    weights: LoraWeights,
    subjects: Sequence[SubjectPhotos],
    config: GenerationConfig,
    base: DiffusionBase | None = None,
    on_step: Callable[[int], None] | None = None,
) -> LoraWeights:
    """Predicted LoRAs refined, resized and scaled as asked; ``on_step`` is told every step of refining.

    Raises ``InvalidArgumentError`` for refining without a base.
    """
    rank = config.rank or model.layout.rank
    if config.refine_steps:
        if base is None:
            raise InvalidArgumentError("refining draws with the base model: give it too")
        targets = torch.stack(
            [photos.base_pixels for photos in subjects if photos.base_pixels is not None]
        )
        weights = refine_predictions(
            model,
            base,
            weights,
            targets.to(model.device),
            num_steps=config.refine_steps,
            out_rank=rank,
            method=config.refine_method,
            on_step=on_step,
            progress_label=None if on_step else "refining",
        )
    elif rank != weights.layout.rank:
        weights = weights.resize(rank)
    return weights * config.strength if config.strength != 1 else weights


def make_metadata(
    model: ImageToLoraBase, title: str, photos: Sequence[Path | bytes]
) -> LoraMetadata:
    """Provenance of a generated LoRA."""
    card = model.card
    resolution = card.get("resolution")
    encoder_name, encoder_license = model.encoder_provenance
    return LoraMetadata(
        title=title.encode(
            "utf-8", "replace"
        ).decode(),  # file names may hold bytes that are no text
        architecture=card.get("architecture", "stable-diffusion-v1"),
        resolution=(resolution, resolution) if resolution else None,
        trigger_phrase=model.trigger_phrase,
        license=card.get("license", ""),
        encoder=encoder_name,
        encoder_license=encoder_license,
        reference_sha256=tuple(compute_sha256(p) for p in photos),
    )


def generate_files(
    model: ImageToLoraBase,
    photo_paths: Sequence[Path],
    output_paths: Sequence[Path],
    config: GenerationConfig,
    base: DiffusionBase | None = None,
    preloaded_images: Sequence[Image.Image] | None = None,
    reranker: IdentityReranker | None = None,
) -> list[GenerationRecord]:
    """One subject's LoRAs, as many as ``output_paths``, each another sample; ``preloaded_images`` are the photos where they have been
    read already. Nothing is written if making them fails."""
    start_time = time.perf_counter()
    validate_config(model, config, len(output_paths))
    images = (
        preloaded_images if preloaded_images is not None else [read_image(p) for p in photo_paths]
    )
    subjects = [
        SubjectPhotos.from_images(images, model, base or (reranker.base if reranker else None))
    ]
    features = encode_subjects(model, subjects)
    samples = generate_candidates(model, features, subjects, config, len(output_paths), reranker)
    loras = [postprocess_loras(model, weights, subjects, config, base)[0] for weights in samples]
    (warnings,) = check_photos(model.ood_detector, model.get_image_features(features))
    seconds = (time.perf_counter() - start_time) / len(output_paths)
    for weights, path in zip(loras, output_paths, strict=True):
        save_lora(
            weights,
            path,
            format=config.format,
            metadata=make_metadata(model, path.stem, photo_paths),
        )
    return [
        GenerationRecord(path.stem, path.name, len(photo_paths), seconds, warnings=warnings)
        for path in output_paths
    ]


def make_numbered_paths(path: Path, num_files: int) -> list[Path]:
    """``me.safetensors`` for one, ``me-1.safetensors``, ``me-2.safetensors``, ... for several."""
    return (
        [path]
        if num_files == 1
        else [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(num_files)]
    )
