"""``make_readme``: the ``README.md`` of a released model, which the hub shows as its model card."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from huggingface_hub import ModelCardData
from torch import nn

from hyperlora.lora.layout import LoraLayout
from hyperlora.pipelines.model_card import ModelCard
from hyperlora.pretrained import REPOSITORY_URL

GENERATED_MARK: Final = "<!-- written by hyperlora; a README.md without this line is kept -->"
"""The line that tells a generated README from one that was written by hand."""
_CALLS: Final[Mapping[str, str]] = {
    "ImageToLora": '["photo.jpg"]',
    "LoraDiffusion": '["photo.jpg"]',
    "PairToLora": '("before.png", "after.png")',
}
"""Arguments of an example call, by the class of the model."""
_METRICS: Final[Mapping[str, str]] = {
    "val/loss_base": "denoising loss without LoRA",
    "val/loss_own": "denoising loss with the subject's own LoRA",
    "val/loss_shuffled": "denoising loss with another subject's LoRA",
    "val/loss_reverse": "denoising loss of undoing the edit",
    "val/identity_own": "identity score, own LoRA",
    "val/identity_shuffled": "identity score, another subject's LoRA",
}
"""What the metrics of validation mean, in the order in which they are shown."""


class DescribedModel(Protocol):
    """What a README tells of a ``PretrainedModel``."""

    card: ModelCard

    @property
    def layout(self) -> LoraLayout:
        """The layout of the LoRAs."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters."""


@dataclass(frozen=True)
class TrainingRecord:
    """How a model was trained.

    Attributes:
        step: Optimizer steps of the weights that are released.
        config: Arguments of the training module and the data module, in types that YAML has.
        scores: Metrics of the held-out subjects at that step, by name.
    """

    step: int
    config: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)


def make_readme(model: DescribedModel, record: TrainingRecord | None = None) -> str:
    """Write the model card of a released model.

    Args:
        model: The model, with its card.
        record: How it was trained; None leaves the sections about it out.

    Returns:
        Markdown with the metadata of the hub as YAML header.
    """
    sections = [_make_header(model), GENERATED_MARK, _make_introduction(model), _make_usage(model)]
    if record is not None:
        sections += [_make_training(record)]
        sections += [_make_scores(record)] if record.scores else []
    return "\n\n".join(sections) + "\n"


def _make_header(model: DescribedModel) -> str:
    data = ModelCardData(
        base_model=model.layout.base,
        library_name="hyperlora",
        license=model.card.license or None,
        tags=["lora", "hypernetwork", "diffusers", model.card.architecture],
    )
    return f"---\n{data.to_yaml()}\n---"


def _make_introduction(model: DescribedModel) -> str:
    layout, card = model.layout, model.card
    side = f"{card.resolution} × {card.resolution} pixels" if card.resolution else "not recorded"
    rows = {
        "class": f"`{type(model).__name__}`",
        "base": f"`{layout.base}`",
        "trigger phrase": f"`{card.trigger_phrase}`" if card.trigger_phrase else "none",
        "LoRA": f"rank {layout.rank}, {len(layout.targets)} targets, {layout.numel:,} numbers",
        "images": side,
        "license of the weights and the LoRAs": card.license or "not recorded",
        "network": f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"# LoRAs for {layout.base} in one forward pass\n\n"
        f"A network of [hyperlora]({REPOSITORY_URL}).\n\n| | |\n|---|---|\n{table}"
    )


def _make_usage(model: DescribedModel) -> str:
    name, trigger = type(model).__name__, model.card.trigger_phrase
    lines = [
        "from diffusers import DiffusionPipeline",
        f"from hyperlora import {name}",
        "",
        f'model = {name}.from_pretrained("FOLDER_OR_HUB_ID")',
        f'model({_CALLS.get(name, "...")}).save("lora.safetensors")',
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("{model.layout.base}")',
        'pipeline.load_lora_weights("lora.safetensors")',
    ]
    if name != "PairToLora":
        prompt = f"a photo of {trigger}" if trigger else "a photo"
        lines += [f'pipeline("{prompt}").images[0].save("image.png")']
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _make_training(record: TrainingRecord) -> str:
    config = json.dumps(record.config, indent=1, default=str)
    return (
        f"## Training\n\nEnd to end through the frozen base, {record.step:,} steps.\n\n"
        f"<details><summary>Configuration</summary>\n\n```json\n{config}\n```\n\n</details>"
    )


def _make_scores(record: TrainingRecord) -> str:
    names = [name for name in _METRICS if name in record.scores]
    names += sorted(record.scores.keys() - set(_METRICS))
    rows = [f"| {_METRICS.get(name, name)} | {record.scores[name]:.4f} |" for name in names]
    return (
        f"## Scores\n\nHeld-out subjects, step {record.step:,}. A network that learns has a lower "
        "loss with the own LoRA than without, and a higher one with another's.\n\n"
        "| metric | value |\n|---|---|\n" + "\n".join(rows)
    )
