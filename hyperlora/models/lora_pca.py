"""Principal components of LoRAs: autoencoders that are learned in closed form, and what a convolution has to beat."""

from typing import Any

import torch
from torch import Tensor, nn

from hyperlora.lora.layout import LoraLayout


class LinearAutoencoder(nn.Module):
    """Rows [batch, numel] to latents [batch, tokens, width] by as many directions as they have numbers, and back."""

    basis: Tensor

    def __init__(self, layout: LoraLayout, tokens: int = 16, width: int = 16) -> None:
        super().__init__()
        self.layout, self.tokens, self.width = layout, tokens, width
        self.config: dict[str, Any] = {"tokens": tokens, "width": width}
        self.register_buffer("basis", torch.zeros(tokens * width, layout.numel))

    @property
    def compression(self) -> float:
        """Numbers of a LoRA per number of its latents."""
        return self.layout.numel / (self.tokens * self.width)

    def learn(self, rows: Tensor) -> None:
        """Of rows [n, numel] of mean 0; where they have fewer directions than asked for, zeros are left."""
        self.basis.copy_(directions(rows, len(self.basis)))

    def encode(self, rows: Tensor) -> Tensor:
        """[batch, tokens, width]."""
        return (rows @ self.basis.mT).unflatten(-1, (self.tokens, self.width))

    def decode(self, latents: Tensor) -> Tensor:
        """[batch, numel]."""
        return latents.flatten(-2) @ self.basis


class PartedAutoencoder(nn.Module):
    """Principal components in two steps: ``each`` directions of every factor (``down`` or ``up`` of a site) alone, then
    ``tokens`` * ``width`` directions of all factors' coefficients together.

    It holds ``each`` * numel numbers where ``LinearAutoencoder`` holds ``tokens`` * ``width`` * numel, and loses little
    more, since what the LoRAs of one base do to one weight lies near a few directions.
    """

    parts: Tensor
    joint: Tensor

    def __init__(self, layout: LoraLayout, tokens: int = 8, width: int = 16, each: int = 20) -> None:
        super().__init__()
        self.layout, self.tokens, self.width, self.each = layout, tokens, width, each
        self.config: dict[str, Any] = {"tokens": tokens, "width": width, "each": each}
        self.sizes = [layout.rank * n for site in layout.sites for n in (site.fan_in, site.fan_out)]
        self.register_buffer("parts", torch.zeros(each, layout.numel))
        self.register_buffer("joint", torch.zeros(tokens * width, len(self.sizes) * each))

    @property
    def compression(self) -> float:
        """Numbers of a LoRA per number of its latents."""
        return self.layout.numel / (self.tokens * self.width)

    def learn(self, rows: Tensor) -> None:
        """Of rows [n, numel] of mean 0; where they have fewer directions than asked for, zeros are left."""
        found = [directions(part, self.each) for part in rows.split(self.sizes, -1)]
        self.parts.copy_(torch.cat(found, -1))
        self.joint.copy_(directions(self._coefficients(rows), len(self.joint)))

    def encode(self, rows: Tensor) -> Tensor:
        """[batch, tokens, width]."""
        return (self._coefficients(rows) @ self.joint.mT).unflatten(-1, (self.tokens, self.width))

    def decode(self, latents: Tensor) -> Tensor:
        """[batch, numel]."""
        coefficients = (latents.flatten(-2) @ self.joint).split(self.each, -1)
        parts = self.parts.split(self.sizes, -1)
        return torch.cat([c @ part for c, part in zip(coefficients, parts, strict=True)], -1)

    def _coefficients(self, rows: Tensor) -> Tensor:
        """[batch, factors * each]."""
        split = zip(rows.split(self.sizes, -1), self.parts.split(self.sizes, -1), strict=True)
        return torch.cat([row @ part.mT for row, part in split], -1)


def directions(rows: Tensor, count: int, least: float = 1e-6) -> Tensor:
    """The ``count`` orthonormal directions of most variance of rows [n, width] of mean 0, [count, width]; zeros in
    place of those whose variance is below ``least`` of the first's.

    From the eigenvectors of the smaller of rows rowsᵀ and rowsᵀ rows.
    """
    rows = rows.float()
    wide = len(rows) < rows.shape[1]
    power, vectors = torch.linalg.eigh((rows @ rows.mT if wide else rows.mT @ rows).double())
    vectors = vectors.flip(1)[:, :count][:, power.flip(0)[:count] > least * power[-1]].float()
    found = torch.linalg.qr(rows.mT @ vectors).Q.mT if wide else vectors.mT
    return torch.cat([found, rows.new_zeros(count - len(found), rows.shape[1])])
