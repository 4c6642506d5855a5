"""``RowScale``: rows of LoRA numbers as networks like them, mean 0 and variance 1, and back."""

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights


class RowScale(nn.Module):
    """Z-score of rows [*batch, P] (2406.09413), whose statistics are buffers and travel in the artifact that holds it.

    With ``balanced``, ``normalize`` first brings the factors to equal singular values and one choice of signs
    (``balanced_rows``), so that rows of equal ΔW are equal; ``unnormalize`` then gives back the same ΔW.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layout: LoraLayout, balanced: bool = False) -> None:
        super().__init__()
        self.layout, self.balanced = layout, balanced
        self.register_buffer("mean", torch.zeros(layout.numel))
        self.register_buffer("std", torch.ones(layout.numel))

    @classmethod
    def of(cls, layout: LoraLayout, batches: Iterable[Tensor], balanced: bool = False) -> Self:
        """The statistics of all rows of ``batches`` [n, P], in one pass (Chan's update); numbers that never change
        keep a standard deviation of 1."""
        made = cls(layout, balanced)
        n, mean, squares = 0, torch.zeros(layout.numel).double(), torch.zeros(layout.numel).double()
        for batch in batches:
            rows = (balanced_rows(layout, batch) if balanced else batch).double()
            shift = rows.mean(0) - mean
            squares += (rows - rows.mean(0)).square().sum(0) + shift.square() * n * len(rows) / (n + len(rows))
            mean += shift * len(rows) / (n + len(rows))
            n += len(rows)
        std = (squares / max(1, n)).sqrt()
        made.mean.copy_(mean)
        made.std.copy_(torch.where(std > 1e-8, std, torch.ones_like(std)))
        return made

    def normalize(self, rows: Tensor) -> Tensor:
        """Undone by ``unnormalize``: the same numbers, or with ``balanced`` the same ΔW."""
        rows = balanced_rows(self.layout, rows) if self.balanced else rows
        return (rows.to(self.mean) - self.mean) / self.std

    def unnormalize(self, rows: Tensor) -> Tensor:
        return rows * self.std + self.mean


def balanced_rows(layout: LoraLayout, rows: Tensor) -> Tensor:
    """Rows [*batch, P] of the same ΔW whose factors have equal singular values, in falling order, the largest number
    of each direction in ``up`` positive: the same for every way to write the ΔW."""
    balanced = LoraWeights.unflatten(layout, rows.float()).balance()
    down, up = [], []
    for d, u in zip(balanced.down, balanced.up, strict=True):
        largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))  # [*batch, 1, rank]
        sign = torch.where(largest < 0, -1.0, 1.0)
        up.append(u * sign)
        down.append(d * sign.mT)
    return LoraWeights(layout, tuple(down), tuple(up)).flatten()
