"""Targets of an edit: what a pair hypernetwork's LoRA must do, and the way back."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperlora.diffusion.losses import AuxLoss
from hyperlora.features import ImageFeatures
from hyperlora.training.batches import AttributeLabels, PairBatch


@dataclass(frozen=True)
class EditTarget:
    """One direction of an edit: from where, to where, and a further loss of the result."""

    input_latents: Tensor
    """[n, c, h, w]."""
    target_latents: Tensor
    """[n, c, h, w]."""
    aux_loss: AuxLoss | None = None
    input_images: Tensor | None = None
    """[n, 3, h, w] in [0, 1], for bases whose text encoder sees the input image."""


def swap_sides(before: Tensor, after: Tensor, swap_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Swap the sides of some samples.

    Args:
        before: [n, ...].
        after: [n, ...].
        swap_mask: Samples whose sides are swapped, [n].

    Returns:
        Both sides.
    """
    mask = swap_mask.view(-1, *[1] * (before.ndim - 1))  # [n, 1, ...]
    return torch.where(mask, after, before), torch.where(mask, before, after)


def swap_features(
    before: ImageFeatures, after: ImageFeatures, swap_mask: Tensor
) -> tuple[ImageFeatures, ImageFeatures]:
    """Swap the sides of some samples.

    Args:
        before: Tokens [n, views, tokens, width].
        after: Tokens of the same shape.
        swap_mask: Samples whose sides are swapped, [n].

    Returns:
        Both sides.
    """
    first, second = swap_sides(before.tokens, after.tokens, swap_mask)
    return ImageFeatures(first), ImageFeatures(second)


def swap_labels(
    batch: PairBatch, swap_mask: Tensor
) -> tuple[AttributeLabels | None, AttributeLabels | None]:
    """Swap the labels of some samples.

    Args:
        batch: With labels of both sides, or without.
        swap_mask: Samples whose sides are swapped, [n].

    Returns:
        Labels of both sides; None where the batch has none.
    """
    before, after = batch.labels_before, batch.labels_after
    if before is None or after is None:
        return None, None
    return _select_labels(swap_mask, after, before), _select_labels(swap_mask, before, after)


def _select_labels(
    mask: Tensor, labels: Mapping[str, Tensor], other_labels: Mapping[str, Tensor]
) -> AttributeLabels:
    """Take ``labels`` where ``mask`` [n] is set and ``other_labels`` elsewhere."""
    return {k: torch.where(mask, labels[k], other_labels[k]) for k in labels}
