"""What the routes order of an engine: a LoRA from photos, a picture with LoRAs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hyperlora.pipelines.generating import Settings


@dataclass(frozen=True)
class LoraOrder:
    """Photos of one subject (file bytes), and how their LoRA is made and written."""

    photos: Sequence[bytes]
    settings: Settings = field(default_factory=Settings)
    title: str = "LoRA"
    consent: bool = False
    method: str | None = None
    """Of the model that makes it; None for the server's first."""


@dataclass(frozen=True)
class PictureOrder:
    """A prompt (may hold ``<lora:...>``), LoRA files (bytes) with their weights, and how to draw."""

    prompt: str
    loras: Sequence[tuple[bytes, float]] = ()
    strategy: str = "merge"
    gamma: float | None = None
    regions: Sequence[tuple[float, float, float, float]] | None = None
    window: bool = False
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 3.0
    width: int | None = None
    height: int | None = None
