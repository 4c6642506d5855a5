"""Photos of subjects to finished LoRAs, and one subject's to files."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.images import read_image, sha256_of, to_tensor
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.errors import BadRequest
from hyperlora.lora.io.metadata import LoraHeader
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora_base import PhotoModel, Sampling
from hyperlora.pipelines.input_checks import unknown
from hyperlora.pipelines.refine_generated import RefineBy, refined, require_refining
from hyperlora.pipelines.rerank import Chooser

LoraFormat = Literal["diffusers", "kohya", "sgm"]


@dataclass(frozen=True)
class Settings:
    """How LoRAs are made and written. ``rank`` None keeps the model's; ``refine`` counts fine-tuning steps, which need
    a ``base``, and ``refine_by`` is ``refined``'s ``by``. A model that samples makes ``best_of`` LoRAs of each subject,
    which need a ``Chooser`` if more than are asked for."""

    format: LoraFormat = "diffusers"
    rank: int | None = None
    strength: float = 1.0
    refine: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    best_of: int = 1
    refine_by: RefineBy | None = None


@dataclass(frozen=True)
class Photos:
    """One subject's photos, decoded once: ``seen`` [views, 3, size, size] by the model and, for refining, ``fitted``
    [views, 3, resolution, resolution] as the base would draw them."""

    seen: Tensor
    fitted: Tensor | None = None

    @classmethod
    def of(cls, images: Sequence[Image.Image], model: PhotoModel, base: Base | None = None) -> "Photos":
        seen = torch.stack([to_tensor(image, model.photo_size) for image in images])
        return cls(seen, torch.stack([to_tensor(image, base.resolution) for image in images]) if base else None)

    @classmethod
    def joined(cls, parts: Sequence["Photos"]) -> "Photos":
        """Photos of one subject that were decoded apart."""
        fitted = [part.fitted for part in parts if part.fitted is not None]
        return cls(torch.cat([part.seen for part in parts]), torch.cat(fitted) if fitted else None)


@dataclass(frozen=True)
class Made:
    """One line of the index: the subject, its file, or why there is none; ``recipe`` tells model and settings apart,
    ``notices`` say what may be wrong with the photos."""

    subject: str
    file: str | None
    photos: int
    seconds: float
    error: str | None = None
    recipe: str = ""
    notices: Sequence[str] = field(default_factory=list)


def generate(
    model: PhotoModel,
    subjects: Sequence[Photos],
    settings: Settings,
    base: Base | None = None,
    features: Any = None,
    chooser: Chooser | None = None,
) -> LoraWeights:
    """LoRAs (batch axis) of subjects with equally many photos each, refined and resized as asked; ``features`` are
    those of their photos where the encoder has seen them already.

    Raises ``BadRequest`` for refining without a base, choosing without a ``chooser``, a rank that no site can fill, and
    several samples of a model that makes one LoRA.
    """
    check(model, settings)
    seen = features if features is not None else features_of(model, subjects)
    (weights,) = candidates(model, seen, subjects, settings, 1, chooser)
    return finished(model, weights, subjects, settings, base)


def check(model: PhotoModel, settings: Settings, samples: int = 1) -> None:
    """Raises ``BadRequest`` for a rank that no site can fill, for samples of a model that makes one LoRA, and for a way
    to refine that the model does not know."""
    require_refining(model, settings.refine_by)
    rank = settings.rank or model.layout.rank
    if rank > (widest := max(min(site.fan_in, site.fan_out) for site in model.layout.sites)):
        raise BadRequest(f"rank {rank} asked for, but no weight of {model.layout.base!r} has more than {widest}")
    if not model.samples and (max(samples, settings.best_of) > 1 or settings.sampling != Sampling()):
        raise BadRequest(
            "this model makes one LoRA of a photo and leaves nothing to chance: n, best-of, seed, sampling steps and "
            "guidance are for a model that samples (--method difflora)"
        )


@torch.no_grad()
def candidates(
    model: PhotoModel, features: Any, subjects: Sequence[Photos], settings: Settings, count: int,
    chooser: Chooser | None = None,
) -> list[LoraWeights]:  # fmt: skip
    """``count`` LoRAs of every subject, each of batch subjects, by the seeds from the settings' on; of more
    (``best_of``), those that ``chooser`` finds most like the photos, the likest first."""
    many, how = max(count, settings.best_of), settings.sampling
    made = [model.made(features, replace(how, seed=how.seed + i)) for i in range(many)]
    if many == 1 or (chooser is None and many == count):
        return made
    if chooser is None:
        raise BadRequest("choosing the best of several LoRAs draws with the base model: give it too")
    likeness = [
        chooser(LoraWeights.stack([lora[i] for lora in made]), photos.seen if photos.fitted is None else photos.fitted)
        for i, photos in enumerate(subjects)
    ]
    orders = [scores.argsort(descending=True).tolist() for scores in likeness]
    return [LoraWeights.stack([made[order[place]][i] for i, order in enumerate(orders)]) for place in range(count)]


def features_of(model: PhotoModel, subjects: Sequence[Photos]) -> Any:
    """What the encoder says about subjects with equally many photos each."""
    return model.features(torch.stack([photos.seen for photos in subjects]).to(model.device))


@torch.no_grad()
def predicted(model: PhotoModel, features: Any, sampling: Sampling | None = None) -> LoraWeights:
    """The one forward pass, after the encoder: LoRAs (batch axis)."""
    return model.made(features, sampling)


def finished(
    model: PhotoModel,
    weights: LoraWeights,
    subjects: Sequence[Photos],
    settings: Settings,
    base: Base | None = None,
    watch: Callable[[int], None] | None = None,
) -> LoraWeights:
    """Predicted LoRAs refined, resized and scaled as asked; ``watch`` is told every step of refining.

    Raises ``BadRequest`` for refining without a base.
    """
    rank = settings.rank or model.layout.rank
    if settings.refine:
        if base is None:
            raise BadRequest("refining draws with the base model: give it too")
        targets = torch.stack([photos.fitted for photos in subjects if photos.fitted is not None])
        weights = refined(
            model, base, weights, targets.to(model.device), steps=settings.refine, out_rank=rank,
            by=settings.refine_by, watch=watch, label=None if watch else "refining",
        )  # fmt: skip
    elif rank != weights.layout.rank:
        weights = weights.resize(rank)
    return weights * settings.strength if settings.strength != 1 else weights


def header_of(model: PhotoModel, title: str, photos: Sequence[Path | bytes]) -> LoraHeader:
    """Provenance of a generated LoRA."""
    card = model.card
    resolution = card.get("resolution")
    encoder, licence = model.seen_through
    return LoraHeader(
        title=title.encode("utf-8", "replace").decode(),  # file names may hold bytes that are no text
        architecture=card.get("architecture", "stable-diffusion-v1"),
        resolution=(resolution, resolution) if resolution else None,
        trigger_phrase=model.trigger,
        license=card.get("license", ""),
        encoder=encoder,
        encoder_license=licence,
        reference_sha256=tuple(sha256_of(p) for p in photos),
    )


def generate_files(
    model: PhotoModel,
    photos: Sequence[Path],
    files: Sequence[Path],
    settings: Settings,
    base: Base | None = None,
    opened: Sequence[Image.Image] | None = None,
    chooser: Chooser | None = None,
) -> list[Made]:
    """One subject's LoRAs, as many as ``files``, each another sample; ``opened`` are the photos where they have been
    read already. Nothing is written if making them fails."""
    began = time.perf_counter()
    check(model, settings, len(files))
    images = opened if opened is not None else [read_image(p) for p in photos]
    subject = [Photos.of(images, model, base or (chooser.base if chooser else None))]
    features = features_of(model, subject)
    made = candidates(model, features, subject, settings, len(files), chooser)
    done = [finished(model, weights, subject, settings, base)[0] for weights in made]
    (notices,) = unknown(model.domain, model.image_features(features))
    seconds = (time.perf_counter() - began) / len(files)
    for weights, file in zip(done, files, strict=True):
        save_lora(weights, file, format=settings.format, header=header_of(model, file.stem, photos))
    return [Made(file.stem, file.name, len(photos), seconds, notices=notices) for file in files]


def numbered(file: Path, count: int) -> list[Path]:
    """``me.safetensors`` for one, ``me-1.safetensors``, ``me-2.safetensors``, ... for several."""
    return [file] if count == 1 else [file.with_name(f"{file.stem}-{i + 1}{file.suffix}") for i in range(count)]
