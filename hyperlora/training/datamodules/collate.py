"""Collate subjects to a batch in the order in which ``inject_lora`` distributes LoRAs."""

from collections.abc import Sequence
from typing import Required, TypedDict

import torch
from torch import Tensor

from hyperlora.diffusion.conditions import Conditions, cat_conditions
from hyperlora.training.batches import SubjectBatch


class SubjectSample(TypedDict, total=False):
    """References and t targets of one subject; fields as in ``SubjectBatch``."""

    captions: Required[list[str]]
    """t captions."""
    subject_id: Required[int]
    photos: Tensor
    """[num_views, 3, h, w] in [0, 1]."""
    tokens: Tensor
    """[num_views, num_tokens, width]."""
    latents: Tensor
    """[t, c, h, w]."""
    images: Tensor
    """[t, 3, h, w] in [0, 1]."""
    labels: list[dict[str, int]]
    """t times the class index by attribute."""
    conditions: list[Conditions]
    """t times the embeddings of a caption, [1, ...] each."""


def collate_subjects(samples: Sequence[SubjectSample]) -> SubjectBatch:
    """Collate the samples of n subjects with t targets each.

    Args:
        samples: n samples with the same fields and the same number of targets.

    Returns:
        The batch; target j of subject i has the index j * n + i.
    """
    num_targets = len(samples[0]["captions"])
    return SubjectBatch(
        captions=[sample["captions"][j] for j in range(num_targets) for sample in samples],
        subject_ids=torch.tensor([sample["subject_id"] for sample in samples]),
        photos=_stack([sample.get("photos") for sample in samples]),  # [n, num_views, 3, h, w]
        tokens=_stack([sample.get("tokens") for sample in samples]),
        latents=_stack_targets([sample.get("latents") for sample in samples]),
        images=_stack_targets([sample.get("images") for sample in samples]),
        labels=_collate_labels(samples, num_targets) if "labels" in samples[0] else None,
        conditions=(
            cat_conditions([s["conditions"][j] for j in range(num_targets) for s in samples])
            if "conditions" in samples[0]
            else None
        ),
    )


def _stack(tensors: Sequence[Tensor | None], axis: int = 0) -> Tensor | None:
    """Stack tensors along a new axis; None if the samples lack the field."""
    stacked = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(stacked, axis) if stacked else None


def _stack_targets(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Stack targets [t, c, h, w] of n subjects to [t * n, c, h, w]."""
    targets = _stack(tensors, axis=1)  # [t, n, c, h, w]
    return None if targets is None else targets.flatten(0, 1)


def _collate_labels(samples: Sequence[SubjectSample], num_targets: int) -> dict[str, Tensor]:
    """Stack the labels of t targets of n subjects to [t * n] by attribute."""
    labels = [sample["labels"][j] for j in range(num_targets) for sample in samples]
    return {name: torch.tensor([classes[name] for classes in labels]) for name in labels[0]}
