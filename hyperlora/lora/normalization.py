"""``LoraNormalizer``: flat LoRAs to mean 0 and variance 1, as networks need them, and back."""

from collections.abc import Iterable
from typing import Final, Self

import torch
from torch import Tensor, nn

from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights

_MIN_STD: Final = 2.0**-24
"""The smallest positive number of float16, in which models are saved: a smaller standard deviation
would be 0 in the file."""


class LoraNormalizer(nn.Module):
    """Z-score of flat LoRAs [*batch, numel] (2406.09413): (x - mean) / std per number.

    The statistics are buffers, so they are saved with the model that holds the normalizer.

    Args:
        layout: The targets and the rank.
        canonical: Whether ``normalize`` first brings equal ΔW to equal numbers
            (``canonicalize_rows``); ``denormalize`` then gives back the same ΔW.

    Attributes:
        mean: [numel].
        std: [numel].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layout: LoraLayout, canonical: bool = False) -> None:
        super().__init__()
        self.layout, self.canonical = layout, canonical
        self.register_buffer("mean", torch.zeros(layout.numel))
        self.register_buffer("std", torch.ones(layout.numel))

    @classmethod
    def fit(
        cls,
        layout: LoraLayout,
        batches: Iterable[Tensor],
        canonical: bool = False,
        per_factor: bool = False,
    ) -> Self:
        """Compute the statistics of all rows in one pass (Chan et al. 1979).

        Args:
            layout: The targets and the rank.
            batches: Flat LoRAs, [n, numel] each.
            canonical: See the class.
            per_factor: Whether all numbers of a factor (``down`` or ``up`` of one target) share
                a standard deviation, so that large weights stay larger than small ones.

        Returns:
            The normalizer. Numbers that never vary have a standard deviation of 1.
        """
        normalizer = cls(layout, canonical)
        num_rows = 0
        mean = torch.zeros(layout.numel).double()  # [numel]
        sum_squares = torch.zeros(layout.numel).double()  # [numel], Σ (x - mean)²
        for batch in batches:
            rows = (canonicalize_rows(layout, batch) if canonical else batch).double()
            n, m = num_rows, len(rows)
            # a: the n rows so far, b: the m rows of this batch. The other way in one pass,
            # Σ x² - n mean², would cancel most digits.
            # δ = mean_b - mean_a;  S = S_a + S_b + δ² n m / (n + m);  mean = mean_a + δ m / (n + m)
            mean_delta = rows.mean(0) - mean  # [numel]
            batch_sum_squares = (rows - rows.mean(0)).square().sum(0)  # [numel]
            sum_squares += batch_sum_squares + mean_delta.square() * n * m / (n + m)
            mean += mean_delta * m / (n + m)
            num_rows += m
        variance = sum_squares / max(1, num_rows)  # [numel]
        if per_factor:
            factors = variance.split(layout.factor_sizes)
            variance = torch.cat([factor.mean().expand_as(factor) for factor in factors])
        std = variance.sqrt()  # [numel]
        normalizer.mean.copy_(mean)
        normalizer.std.copy_(torch.where(std > _MIN_STD, std, torch.ones_like(std)))
        return normalizer

    def normalize(self, rows: Tensor) -> Tensor:
        """Normalize flat LoRAs; ``denormalize`` is the inverse (with ``canonical``, up to ΔW).

        Args:
            rows: [*batch, numel].

        Returns:
            [*batch, numel] of mean 0 and variance 1.
        """
        rows = canonicalize_rows(self.layout, rows) if self.canonical else rows
        return (rows.to(self.mean) - self.mean) / self.std

    def denormalize(self, rows: Tensor) -> Tensor:
        """Undo ``normalize``.

        Args:
            rows: [*batch, numel].

        Returns:
            Flat LoRAs [*batch, numel].
        """
        return rows * self.std + self.mean


def canonicalize_rows(layout: LoraLayout, rows: Tensor) -> Tensor:
    """Rewrite flat LoRAs so that equal ΔW have equal numbers.

    Both factors have equal singular values in descending order. The sign of each direction makes
    its largest number in ``up`` positive.

    Args:
        layout: The targets and the rank.
        rows: [*batch, numel].

    Returns:
        [*batch, numel] of the same ΔW.
    """
    canonical = LoraWeights.unflatten(layout, rows.float()).canonicalize()
    downs, ups = [], []
    for down, up in zip(canonical.down, canonical.up, strict=True):
        # (u, v) and (-u, -v) have the same product u v; the sign of the largest number decides
        largest_index = up.abs().argmax(-2, keepdim=True)  # [*B, 1, r]
        largest_entry = up.gather(-2, largest_index)  # [*B, 1, r]
        sign = torch.where(largest_entry < 0, -1.0, 1.0)  # [*B, 1, r]; never 0, unlike sign()
        ups.append(up * sign)  # [*B, out, r]
        downs.append(down * sign.mT)  # [*B, r, in]
    return LoraWeights(layout, tuple(downs), tuple(ups)).flatten()
