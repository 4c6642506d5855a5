"""``estimate_memory``: the memory of a training from its modules, with or without numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from hyperlora.diffusion.families.base import PipelineFamily
from hyperlora.lora.layout import LoraLayout
from hyperlora.training.activations import (
    estimate_activation_bytes,
    estimate_text_activation_bytes,
)
from hyperlora.training.memory import (
    MemoryRow,
    TrainerOptions,
    TrainingMemory,
    describe_lora,
    make_frozen_row,
    make_network_rows,
)
from hyperlora.training.network_activations import estimate_network_activation_bytes

if TYPE_CHECKING:
    from diffusers import ModelMixin


@dataclass(frozen=True)
class BatchSize:
    """What one device computes in one step.

    Attributes:
        num_subjects: Subjects, or edits.
        num_targets: Target images of each.
        resolution: Their side in pixels.
        num_passes: Forward passes of the denoiser before one backward pass.
        num_views: Photos, or pairs, of each subject at most.
    """

    num_subjects: int = 1
    num_targets: int = 1
    resolution: int = 512
    num_passes: int = 1
    num_views: int = 1

    @classmethod
    def from_config(
        cls, data: Mapping[str, Any], model: Mapping[str, Any], base_resolution: int
    ) -> "BatchSize":
        """Read the arguments of a data module and of a training module.

        Args:
            data: Of the data module; what is missing is 1.
            model: Of the training module.
            base_resolution: Of a data module without ``resolution``.

        Returns:
            The sizes.
        """
        return cls(
            num_subjects=data.get("batch_size") or 1,
            num_targets=data.get("num_targets") or 1,
            resolution=data.get("resolution") or base_resolution,
            num_passes=2 if model.get("reverse_weight") else 1,
            num_views=min(data.get("num_views") or 1, model.get("max_views") or 1),
        )


@dataclass(frozen=True)
class TrainingParts:
    """The parts of a training.

    Attributes:
        base_rows: Rows of the frozen base.
        family: Adapter of its pipeline.
        denoiser: Its denoiser on the meta device.
        encoder: The image encoder.
        network: All that is trained.
        layout: Of the LoRAs.
        batch: What one device computes in one step.
        use_checkpointing: Whether the denoiser recomputes activations.
        options: Of the trainer.
        text_encoders: Those that are adapted, by component, on the meta device.
    """

    base_rows: Sequence[MemoryRow]
    family: PipelineFamily
    denoiser: "ModelMixin"
    encoder: nn.Module
    network: nn.Module
    layout: LoraLayout
    batch: BatchSize
    use_checkpointing: bool = False
    options: TrainerOptions = field(default_factory=TrainerOptions)
    text_encoders: Mapping[str, nn.Module] = field(default_factory=dict)


def estimate_memory(parts: TrainingParts) -> TrainingMemory:
    """Estimate the memory of a training on each device.

    Args:
        parts: Modules and sizes.

    Returns:
        The table.
    """
    rows, batch = list(parts.base_rows), parts.batch
    if not any(p.requires_grad for p in parts.encoder.parameters()):
        rows.append(make_frozen_row("image encoder", parts.encoder, "encoder"))
    rows += make_network_rows(parts.network, parts.options)
    lora_bytes = 2 * 4 * parts.layout.numel * batch.num_subjects
    rows.append(MemoryRow("LoRAs of a batch and their gradients", None, lora_bytes, "activations"))
    network_bytes = estimate_network_activation_bytes(
        parts.encoder, parts.network, batch.num_subjects, batch.num_views
    )
    rows.append(
        MemoryRow("activations of the network (estimate)", None, network_bytes, "activations")
    )
    num_samples = batch.num_subjects * batch.num_targets
    # measured before checkpointing changes the denoiser
    is_half = next(parts.denoiser.parameters()).element_size() == 2
    activation_bytes = estimate_activation_bytes(
        parts.family,
        parts.denoiser,
        parts.layout,
        num_samples,
        batch.resolution,
        parts.use_checkpointing,
    )
    if activation_bytes is not None:
        activation_bytes *= batch.num_passes
    name = f"activations, {num_samples} x {batch.resolution}² pixels (estimate)"
    rows.append(MemoryRow(name, None, activation_bytes, "activations"))
    if parts.text_encoders:
        text_bytes = batch.num_passes * estimate_text_activation_bytes(
            parts.text_encoders, parts.layout, num_samples
        )
        rows.append(
            MemoryRow("activations of text encoders (estimate)", None, text_bytes, "activations")
        )
    return TrainingMemory(rows, describe_lora(parts.layout), parts.use_checkpointing, is_half)
