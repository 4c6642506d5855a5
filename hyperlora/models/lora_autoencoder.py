"""``LoraAutoencoder``: LoRAs to a short sequence of latents and back, by 1-D convolutions (LAE; DiffLoRA, 2408.06740).

The numbers of one rank direction of one site (its row of ``down``, then its column of ``up``) stand side by side,
sites in layout order; convolutions slide along that line. A number's meaning depends on where it stands, which a
convolution cannot see: after each one, features are scaled and shifted by numbers of their own for every place.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.lora.layout import LoraLayout


class LoraAutoencoder(nn.Module):
    """Normalised rows (``RowScale``) [batch, layout.numel] to latents [batch, tokens, width] and back.

    Every stage of ``channels`` makes the line ``stride`` times shorter; ``width`` numbers are left of each place.
    With ``variational`` the encoder tells a mean and a variance (β-VAE).
    """

    order: Tensor

    def __init__(
        self,
        layout: LoraLayout,
        channels: tuple[int, ...] = (16, 32, 64, 96, 128),
        stride: int = 4,
        width: int = 64,
        variational: bool = False,
    ) -> None:
        super().__init__()
        self.layout, self.variational, self.width = layout, variational, width
        self.config: dict[str, Any] = {
            "channels": list(channels), "stride": stride, "width": width, "variational": variational,
        }  # fmt: skip
        self.step = stride ** len(channels)
        self.tokens = -(-layout.numel // self.step)
        line = self.tokens * self.step
        lengths = [line // stride ** (i + 1) for i in range(len(channels))]
        inner = (1, *channels)
        self.down = nn.ModuleList(_Stage(inner[i], inner[i + 1], stride, lengths[i]) for i in range(len(channels)))
        self.to_latents = nn.Conv1d(channels[-1], width * (2 if variational else 1), 1)
        self.from_latents = nn.Conv1d(width, channels[-1], 1)
        self.up = nn.ModuleList(
            _Stage(inner[i + 1], inner[i], stride, lengths[i], up=True) for i in reversed(range(len(channels)))
        )
        self.register_buffer("order", rank_order(layout), persistent=False)

    @property
    def compression(self) -> float:
        """Numbers of a LoRA per number of its latents."""
        return self.layout.numel / (self.tokens * self.width)

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents, [batch, tokens, width] each (the latter -inf unless
        variational)."""
        line = rows[..., self.order]
        x = F.pad(line, (0, self.tokens * self.step - line.shape[-1]))[:, None]
        for stage in self.down:
            x = stage(x)
        found = self.to_latents(x).mT
        if not self.variational:
            return found, torch.full_like(found, -torch.inf)
        mean, logvar = found.chunk(2, -1)
        return mean, logvar.clamp(-20, 10)

    def encode(self, rows: Tensor) -> Tensor:
        """The latents' mean, [batch, tokens, width]."""
        return self.moments(rows)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """[batch, layout.numel]."""
        x = self.from_latents(latents.mT)
        for stage in self.up:
            x = stage(x)
        line = torch.empty_like(x[:, 0, : self.layout.numel])
        line[:, self.order] = x[:, 0, : self.layout.numel]
        return line

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded (sampled if variational and in training) and decoded rows, and the divergence of the latents from a
        standard normal distribution per number [batch] (0 unless variational)."""
        mean, logvar = self.moments(rows)
        if not self.variational:
            return self.decode(mean), mean.new_zeros(len(mean))
        divergence = (mean.square() + logvar.exp() - 1 - logvar).mean((1, 2)) / 2
        if self.training:
            mean = mean + torch.randn_like(mean) * (logvar / 2).exp()
        return self.decode(mean), divergence


class _Stage(nn.Module):
    """One convolution that shortens (or lengthens) the line, a scale and shift for every place, a residual block."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, places: int, up: bool = False) -> None:
        super().__init__()
        if up:
            self.resample: nn.Module = nn.ConvTranspose1d(fan_in, fan_out, stride, stride)
        else:
            self.resample = nn.Conv1d(fan_in, fan_out, stride, stride)
        wide = fan_in if up else fan_out  # the short side of the line: places are fewest there
        self.scale = nn.Parameter(torch.ones(wide, places))
        self.shift = nn.Parameter(torch.zeros(wide, places))
        last = nn.Conv1d(wide, wide, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.block = nn.Sequential(nn.Conv1d(wide, wide, 3, padding=1), nn.GELU(), last)
        self.is_up = up

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_up:
            x = self.resample(x)
        x = x * self.scale + self.shift
        x = x + self.block(x)
        return self.resample(x) if self.is_up else x


def rank_order(layout: LoraLayout) -> Tensor:
    """[numel] indices into a flat LoRA that put, site by site and direction by direction, the row of ``down`` before
    the column of ``up`` that it is multiplied with."""
    parts, at = [], 0
    for site in layout.sites:
        down = torch.arange(layout.rank * site.fan_in).view(layout.rank, site.fan_in) + at
        at += down.numel()
        up = torch.arange(site.fan_out * layout.rank).view(site.fan_out, layout.rank).mT + at
        at += up.numel()
        parts.append(torch.cat([down, up], 1).flatten())
    return torch.cat(parts)


def weight_preserved_loss(found: Tensor, wanted: Tensor, weight: float) -> Tensor:
    """mean((1 + λ |w| / max |w|) (w - ŵ)²), λ = ``weight``: large numbers count more. The published formula is unknown;
    this is ours. Both [batch, numel]; max over each LoRA."""
    share = wanted.abs() / wanted.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return ((1 + weight * share) * (found - wanted).square()).mean()
