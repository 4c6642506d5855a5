"""``ModelFacts``: what the server tells of each of its models."""

from dataclasses import dataclass

from hyperlora.pipelines import Base
from hyperlora.pipelines.released import ReleasedModel


@dataclass(frozen=True)
class ModelFacts:
    """One model that the engine holds."""

    id: str
    kind: str
    base: str
    rank: int
    sites: int
    fingerprint: str
    trigger_phrase: str
    license: str
    resolution: int
    lora_format: str
    """What A1111, Forge and ComfyUI read for this base: kohya for UNets, diffusers for transformers."""
    likeness: bool = False
    """Whether /v1/likeness knows how to compare what it draws."""


def facts_of(kind: str, model: ReleasedModel, base: Base, likeness: bool = False) -> ModelFacts:
    """Of a model and its base."""
    layout, card = model.layout, model.card
    return ModelFacts(
        kind, kind, layout.base, layout.rank, len(layout.sites), layout.fingerprint,
        str(card.get("trigger_phrase", "")), str(card.get("license", "")), base.resolution,
        "kohya" if "unet" in layout.components else "diffusers", likeness,
    )  # fmt: skip
