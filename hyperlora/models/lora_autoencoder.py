"""``LoraAutoencoder``: LoRAs to a short sequence of latents and back, by 1-D convolutions (LAE; DiffLoRA, 2408.06740).

The numbers of one rank direction of one site (its row of ``down_blocks``, then its column of ``up``) stand side by side,
sites in layout order; convolutions slide along that line. A number's meaning depends on where it stands, which a
convolution cannot see: after each one, features are scaled and shifted by numbers of their own for every place.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.lora.layout import LoraLayout


class LoraAutoencoder(nn.Module):
    """Normalised rows (``LoraNormalizer``) [batch, layout.numel] to latents [batch, tokens, width] and back.

    Every stage of ``channels`` makes the line ``stride`` times shorter; ``latent_width`` numbers are left of each place.
    With ``variational`` the encoder tells a mean and a variance (β-VAE).
    """

    permutation: Tensor

    def __init__(
        self,
        layout: LoraLayout,
        channels: tuple[int, ...] = (16, 32, 64, 96, 128),
        stride: int = 4,
        latent_width: int = 64,
        variational: bool = False,
    ) -> None:
        super().__init__()
        self.layout, self.variational, self.latent_width = layout, variational, latent_width
        self.config: dict[str, Any] = {
            "channels": list(channels),
            "stride": stride,
            "width": latent_width,
            "variational": variational,
        }
        self.downsample_factor = stride ** len(channels)
        self.num_tokens = -(-layout.numel // self.downsample_factor)
        padded_length = self.num_tokens * self.downsample_factor
        stage_lengths = [padded_length // stride ** (i + 1) for i in range(len(channels))]
        stage_channels = (1, *channels)
        self.down_blocks = nn.ModuleList(
            _ConvStage(stage_channels[i], stage_channels[i + 1], stride, stage_lengths[i])
            for i in range(len(channels))
        )
        self.quant_conv = nn.Conv1d(channels[-1], latent_width * (2 if variational else 1), 1)
        self.post_quant_conv = nn.Conv1d(latent_width, channels[-1], 1)
        self.up_blocks = nn.ModuleList(
            _ConvStage(
                stage_channels[i + 1], stage_channels[i], stride, stage_lengths[i], upsample=True
            )
            for i in reversed(range(len(channels)))
        )
        self.register_buffer("order", make_rank_major_permutation(layout), persistent=False)

    @property
    def compression(self) -> float:
        """Numbers of a LoRA per number of its latents."""
        return self.layout.numel / (self.num_tokens * self.latent_width)

    def encode_moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents, [batch, tokens, width] each (the latter -inf unless
        variational)."""
        sequence = rows[..., self.permutation]
        x = F.pad(sequence, (0, self.num_tokens * self.downsample_factor - sequence.shape[-1]))[
            :, None
        ]
        for stage in self.down_blocks:
            x = stage(x)
        moments = self.quant_conv(x).mT
        if not self.variational:
            return moments, torch.full_like(moments, -torch.inf)
        mean, logvar = moments.chunk(2, -1)
        return mean, logvar.clamp(-20, 10)

    def encode(self, rows: Tensor) -> Tensor:
        """The latents' mean, [batch, tokens, width]."""
        return self.encode_moments(rows)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """[batch, layout.numel]."""
        x = self.post_quant_conv(latents.mT)
        for stage in self.up_blocks:
            x = stage(x)
        rows = torch.empty_like(x[:, 0, : self.layout.numel])
        rows[:, self.permutation] = x[:, 0, : self.layout.numel]
        return rows

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded (sampled if variational and in training) and decoded rows, and the divergence of the latents from a
        standard normal distribution per number [batch] (0 unless variational)."""
        mean, logvar = self.encode_moments(rows)
        if not self.variational:
            return self.decode(mean), mean.new_zeros(len(mean))
        kl = (mean.square() + logvar.exp() - 1 - logvar).mean((1, 2)) / 2
        if self.training:
            mean = mean + torch.randn_like(mean) * (logvar / 2).exp()
        return self.decode(mean), kl


class _ConvStage(nn.Module):
    """One convolution that shortens (or lengthens) the line, a scale and shift for every place, a residual block."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, length: int, upsample: bool = False
    ) -> None:
        super().__init__()
        if upsample:
            self.resample: nn.Module = nn.ConvTranspose1d(in_channels, out_channels, stride, stride)
        else:
            self.resample = nn.Conv1d(in_channels, out_channels, stride, stride)
        channels = (
            in_channels if upsample else out_channels
        )  # the short side of the line: places are fewest there
        self.scale = nn.Parameter(torch.ones(channels, length))
        self.shift = nn.Parameter(torch.zeros(channels, length))
        conv_out = nn.Conv1d(channels, channels, 3, padding=1)
        nn.init.zeros_(conv_out.weight)
        nn.init.zeros_(conv_out.bias)  # type: ignore[arg-type]
        self.block = nn.Sequential(nn.Conv1d(channels, channels, 3, padding=1), nn.GELU(), conv_out)
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        if not self.upsample:
            x = self.resample(x)
        x = x * self.scale + self.shift
        x = x + self.block(x)
        return self.resample(x) if self.upsample else x


def make_rank_major_permutation(layout: LoraLayout) -> Tensor:
    """[numel] indices into a flat LoRA that put, site by site and direction by direction, the row of ``down_blocks`` before
    the column of ``up`` that it is multiplied with."""
    indices, offset = [], 0
    for target in layout.targets:
        down = (
            torch.arange(layout.rank * target.in_features).view(layout.rank, target.in_features)
            + offset
        )
        offset += down.numel()
        up = (
            torch.arange(target.out_features * layout.rank)
            .view(target.out_features, layout.rank)
            .mT
            + offset
        )
        offset += up.numel()
        indices.append(torch.cat([down, up], 1).flatten())
    return torch.cat(indices)


def compute_weight_preserved_loss(
    reconstruction: Tensor, target: Tensor, magnitude_weight: float
) -> Tensor:
    """mean((1 + λ |w| / max |w|) (w - ŵ)²), λ = ``magnitude_weight``: large numbers count more. The published formula is unknown;
    this is ours. Both [batch, numel]; max over each LoRA."""
    relative_magnitude = target.abs() / target.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return ((1 + magnitude_weight * relative_magnitude) * (reconstruction - target).square()).mean()
