"""``LoraNormalizer``: rows of LoRA numbers as networks like them, mean 0 and variance 1, and back."""

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights


class LoraNormalizer(nn.Module):
    """Z-score of rows [*batch, P] (2406.09413), whose statistics are buffers and travel in the artifact that holds it.

    With ``canonical``, ``normalize`` first brings the factors to equal singular values and one choice of signs
    (``canonicalize_rows``), so that rows of equal ΔW are equal; ``denormalize`` then gives back the same ΔW.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layout: LoraLayout, canonical: bool = False) -> None:
        super().__init__()
        self.layout, self.canonical = layout, canonical
        self.register_buffer("mean", torch.zeros(layout.numel))
        self.register_buffer("std", torch.ones(layout.numel))

    @classmethod
    def fit(cls, layout: LoraLayout, batches: Iterable[Tensor], canonical: bool = False) -> Self:
        """The statistics of all rows of ``batches`` [n, P], in one pass (Chan's update); numbers that never change
        keep a standard deviation of 1."""
        normalizer = cls(layout, canonical)
        n, mean, sum_squares = (
            0,
            torch.zeros(layout.numel).double(),
            torch.zeros(layout.numel).double(),
        )
        for batch in batches:
            rows = (canonicalize_rows(layout, batch) if canonical else batch).double()
            mean_delta = rows.mean(0) - mean
            sum_squares += (rows - rows.mean(0)).square().sum(0) + mean_delta.square() * n * len(
                rows
            ) / (n + len(rows))
            mean += mean_delta * len(rows) / (n + len(rows))
            n += len(rows)
        std = (sum_squares / max(1, n)).sqrt()
        normalizer.mean.copy_(mean)
        normalizer.std.copy_(torch.where(std > 1e-8, std, torch.ones_like(std)))
        return normalizer

    def normalize(self, rows: Tensor) -> Tensor:
        """Undone by ``denormalize``: the same numbers, or with ``canonical`` the same ΔW."""
        rows = canonicalize_rows(self.layout, rows) if self.canonical else rows
        return (rows.to(self.mean) - self.mean) / self.std

    def denormalize(self, rows: Tensor) -> Tensor:
        return rows * self.std + self.mean


def canonicalize_rows(layout: LoraLayout, rows: Tensor) -> Tensor:
    """Rows [*batch, P] of the same ΔW whose factors have equal singular values, in falling order, the largest number
    of each direction in ``up`` positive: the same for every way to write the ΔW."""
    canonical = LoraWeights.unflatten(layout, rows.float()).canonicalize()
    down, up = [], []
    for d, u in zip(canonical.down, canonical.up, strict=True):
        largest_entry = u.gather(-2, u.abs().argmax(-2, keepdim=True))  # [*batch, 1, rank]
        sign = torch.where(largest_entry < 0, -1.0, 1.0)
        up.append(u * sign)
        down.append(d * sign.mT)
    return LoraWeights(layout, tuple(down), tuple(up)).flatten()
