"""``ModelInfo``: what the server tells of each of its models."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.pipelines.generate import GenerationConfig, LoraFormat
from hyperlora.pipelines.pretrained_model import PretrainedModel


@dataclass(frozen=True)
class EditLoraRequest:
    """Pairs that show one edit (file bytes: before, after), and how the LoRA of it is made and written."""

    pairs: Sequence[tuple[bytes, bytes]]
    strength: float = 1.0
    format: LoraFormat = "diffusers"
    title: str = "change"
    consent: bool = False


@dataclass(frozen=True)
class EditImageRequest:
    """A picture to edit, by the change that ``pairs`` show or by a LoRA file (bytes)."""

    image: bytes
    pairs: Sequence[tuple[bytes, bytes]] = ()
    lora: bytes | None = None
    strength: float = 1.0
    instruction: str = ""
    seed: int = 0
    num_inference_steps: int | None = None
    """The model's own if not given."""
    repaint: bool = False
    """What the change leaves alone too."""


@dataclass(frozen=True)
class EngineResult:
    """What was made (file bytes, or a picture), and what may be wrong with it, a sentence each."""

    value: Any
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SimilarityRequest:
    """Photos of one person and pictures to compare with them (file bytes), at least one of each."""

    photos: Sequence[bytes]
    images: Sequence[bytes]


@dataclass(frozen=True)
class ModelInfo:
    """One model that the engine holds."""

    id: str
    kind: str
    base: str
    rank: int
    num_targets: int
    fingerprint: str
    trigger_phrase: str
    license: str
    resolution: int
    lora_format: str
    """What A1111, Forge and ComfyUI read for this base: kohya for UNets, diffusers for transformers."""
    supports_identity_similarity: bool = False
    """Whether /v1/likeness knows how to compare what it draws."""


def describe_model(
    kind: str,
    model: PretrainedModel,
    base: DiffusionBase,
    supports_identity_similarity: bool = False,
) -> ModelInfo:
    """Of a model and its base."""
    layout, card = model.layout, model.card
    return ModelInfo(
        kind,
        kind,
        layout.base,
        layout.rank,
        len(layout.targets),
        layout.fingerprint,
        str(card.get("trigger_phrase", "")),
        str(card.get("license", "")),
        base.resolution,
        "kohya" if "unet" in layout.components else "diffusers",
        supports_identity_similarity,
    )


@dataclass(frozen=True)
class LoraRequest:
    """Photos of one subject (file bytes), and how their LoRA is made and written."""

    photos: Sequence[bytes]
    config: GenerationConfig = field(default_factory=GenerationConfig)
    title: str = "LoRA"
    consent: bool = False
    method: str | None = None
    """Of the model that makes it; None for the server's first."""


@dataclass(frozen=True)
class ImageRequest:
    """A prompt (may hold ``<lora:...>``), LoRA files (bytes) with their weights, and how to draw."""

    prompt: str
    loras: Sequence[tuple[bytes, float]] = ()
    strategy: str = "merge"
    gamma: float | None = None
    regions: Sequence[tuple[float, float, float, float]] | None = None
    windowed: bool = False
    negative_prompt: str = ""
    seed: int = 0
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    width: int | None = None
    height: int | None = None
