"""``LoraAutoencoder``: LoRAs to a short sequence of latents and back, by 1-D convolutions.

It is the LAE of DiffLoRA (2408.06740). The numbers of a LoRA form one sequence. For every target
module and rank index r, it has the row r of ``down``, then the column r of ``up``. What a number
means depends on its position, which a convolution cannot see. Each stage therefore has a scale and
a shift per position and channel.
"""

from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.lora.layout import LoraLayout


class LoraAutoencoderConfig(TypedDict):
    """Arguments of a ``LoraAutoencoder`` besides its layout, as in ``config.json``."""

    channels: list[int]
    stride: int
    latent_width: int
    variational: bool


class LoraAutoencoder(nn.Module):
    """Convolutional autoencoder of LoRAs, optionally variational (β-VAE).

    Letters of shapes: B LoRAs (batch), D numbers of a LoRA (``numel``), D' the same after padding,
    s ``stride``, k stages, C_i channels after stage i (C_0 = 1), L tokens of the latents, Z
    ``latent_width``. Convolutions have the channels before the positions.

    Args:
        layout: Target modules and rank of the LoRAs.
        channels: Output channels of each encoder stage.
        stride: Factor by which each stage shortens the sequence.
        latent_width: Channels of the latents.
        variational: Whether the encoder predicts a mean and a variance.
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
        self.config: LoraAutoencoderConfig = {
            "channels": list(channels),
            "stride": stride,
            "latent_width": latent_width,
            "variational": variational,
        }
        num_stages = len(channels)
        self.downsample_factor = stride**num_stages  # s^k
        self.num_tokens = -(-layout.numel // self.downsample_factor)  # L, rounded up
        padded_length = self.num_tokens * self.downsample_factor  # D': s divides it k times
        stage_lengths = [padded_length // stride ** (i + 1) for i in range(num_stages)]
        stage_channels = (1, *channels)  # C_0 ... C_k
        self.down_blocks = nn.ModuleList(
            _ConvStage(stage_channels[i], stage_channels[i + 1], stride, stage_lengths[i])
            for i in range(num_stages)
        )
        # convolutions of kernel size 1 around the latents, as in AutoencoderKL of diffusers
        self.quant_conv = nn.Conv1d(channels[-1], latent_width * (2 if variational else 1), 1)
        self.post_quant_conv = nn.Conv1d(latent_width, channels[-1], 1)
        self.up_blocks = nn.ModuleList(
            _ConvStage(
                stage_channels[i + 1], stage_channels[i], stride, stage_lengths[i], upsample=True
            )
            for i in reversed(range(num_stages))
        )
        self.register_buffer("permutation", make_rank_major_permutation(layout), persistent=False)

    @property
    def compression(self) -> float:
        """Numbers of a LoRA per number of its latents."""
        return self.layout.numel / (self.num_tokens * self.latent_width)

    def encode_moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Predict mean and log-variance of the latents.

        Args:
            rows: Flat, normalized LoRAs (``LoraNormalizer``), [batch, numel].

        Returns:
            Mean and log-variance, each [batch, num_tokens, latent_width]. The latter is -inf
            unless variational.
        """
        sequence = rows[..., self.permutation]  # neighbors now belong to one rank index, [B, D]
        num_padding = self.num_tokens * self.downsample_factor - sequence.shape[-1]  # D' - D
        x = F.pad(sequence, (0, num_padding))[:, None]  # [B, 1, D']
        for stage in self.down_blocks:
            x = stage(x)  # [B, C_i, D' / s^i] for i = 1 ... k, in the end [B, C_k, L]
        moments = self.quant_conv(x).mT  # [B, L, Z], variational [B, L, 2·Z]
        if not self.variational:
            return moments, torch.full_like(moments, -torch.inf)  # σ² = 0
        mean, logvar = moments.chunk(2, -1)  # μ and log σ², each [B, L, Z]
        return mean, logvar.clamp(-20, 10)  # σ² from 2e-9 to 2e4: exp must not overflow

    def encode(self, rows: Tensor) -> Tensor:
        """Encode flat, normalized LoRAs [batch, numel] to the latents' mean.

        Returns:
            [batch, num_tokens, latent_width].
        """
        return self.encode_moments(rows)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [batch, num_tokens, latent_width].

        Returns:
            Flat, normalized LoRAs, [batch, numel].
        """
        x = self.post_quant_conv(latents.mT)  # [B, C_k, L]
        for stage in self.up_blocks:
            x = stage(x)  # [B, C_i, D' / s^i] for i = k - 1 ... 0, in the end [B, 1, D']
        sequence = x[:, 0, : self.layout.numel]  # without the padding, [B, D]
        rows = torch.empty_like(sequence)
        rows[:, self.permutation] = sequence  # assigned, not read: the inverse permutation
        return rows

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct LoRAs; a variational encoder's latents are sampled in training.

        The divergence of the latents from the standard normal distribution is
        KL = mean (μ² + σ² - 1 - log σ²) / 2, with the mean over all their numbers.

        Args:
            rows: Flat, normalized LoRAs, [batch, numel].

        Returns:
            Reconstruction [batch, numel] and divergence [batch], 0 unless variational.
        """
        mean, logvar = self.encode_moments(rows)  # each [B, L, Z]
        if not self.variational:
            return self.decode(mean), mean.new_zeros(len(mean))  # [B, D], [B]
        # 1312.6114, eq. 10, with a mean for the sum: β then does not depend on L and Z
        kl_divergence = (mean.square() + logvar.exp() - 1 - logvar).mean((1, 2)) / 2  # [B]
        latents = mean
        if self.training:
            # z = μ + σ ε, so that gradients reach μ and σ
            latents = mean + torch.randn_like(mean) * (logvar / 2).exp()  # [B, L, Z]
        return self.decode(latents), kl_divergence  # [B, D], [B]


class _ConvStage(nn.Module):
    """A strided convolution, a scale and shift per position, and a residual block.

    The convolution comes first when downsampling and last when upsampling, so that all else works
    on the shorter sequence.

    Letters of shapes: B batch, c channels of the shorter sequence, l its length, s ``stride``.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        stride: Factor between the longer and the shorter sequence.
        length: Of the shorter sequence.
        upsample: Whether the output is the longer one.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, length: int, upsample: bool = False
    ) -> None:
        super().__init__()
        conv_class = nn.ConvTranspose1d if upsample else nn.Conv1d
        # kernel size = stride: patches of s numbers that do not overlap
        self.resample: nn.Module = conv_class(in_channels, out_channels, stride, stride)
        channels = in_channels if upsample else out_channels  # c
        self.scale = nn.Parameter(torch.ones(channels, length))  # [c, l], also the shift
        self.shift = nn.Parameter(torch.zeros(channels, length))
        conv_out = nn.Conv1d(channels, channels, 3, padding=1)  # keeps the length l
        # 0, so the residual block is the identity at first
        nn.init.zeros_(conv_out.weight)
        nn.init.zeros_(conv_out.bias)  # type: ignore[arg-type]
        self.block = nn.Sequential(nn.Conv1d(channels, channels, 3, padding=1), nn.GELU(), conv_out)
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, in_length] to [batch, out_channels, out_length]."""
        if not self.upsample:
            x = self.resample(x)  # [B, in_channels, s·l] to [B, c, l]
        x = x * self.scale + self.shift  # [B, c, l]
        x = x + self.block(x)  # [B, c, l]
        return self.resample(x) if self.upsample else x  # upsampled: [B, out_channels, s·l]


def make_rank_major_permutation(layout: LoraLayout) -> Tensor:
    """Make the permutation that puts the numbers of each rank index next to each other.

    A flat LoRA has all of ``down``, then all of ``up`` of each target module. The permuted one has
    for each rank index r the row r of ``down``, then the column r of ``up``.

    Args:
        layout: Target modules and rank of the LoRA.

    Returns:
        Indices into the flat LoRA, [numel].
    """
    rank, offset = layout.rank, 0
    indices: list[Tensor] = []
    for target in layout.targets:
        # where the numbers of each factor lie in the flat LoRA: down [r, in], up [out, r]
        down = torch.arange(rank * target.in_features).view(rank, target.in_features) + offset
        offset += down.numel()
        up = torch.arange(target.out_features * rank).view(target.out_features, rank) + offset
        offset += up.numel()
        indices.append(torch.cat([down, up.mT], 1).flatten())  # [r, in + out], then one axis
    return torch.cat(indices)  # [D]


def compute_weight_preserved_loss(
    reconstruction: Tensor, target: Tensor, magnitude_weight: float
) -> Tensor:
    """Compute a squared error that weights large numbers more.

        mean((1 + λ |w| / max |w|) (w - ŵ)²)

    DiffLoRA's weight-preserved loss has no published formula; this one is ours.

    Args:
        reconstruction: ŵ, [batch, numel].
        target: w, [batch, numel]. The maximum is that of each LoRA.
        magnitude_weight: λ; 0 gives the mean squared error.

    Returns:
        Loss, a scalar.
    """
    # the clamp avoids 0 / 0 for a LoRA of zeros
    max_magnitude = target.abs().amax(-1, keepdim=True).clamp(min=1e-12)  # max |w|  [B, 1]
    weights = 1 + magnitude_weight * target.abs() / max_magnitude  # from 1 to 1 + λ, [B, D]
    return (weights * (reconstruction - target).square()).mean()
