"""``LoraAutoencoder``: LoRAs to a short sequence of latents and back (the LAE of DiffLoRA).

What a number of a LoRA means depends on its position. Kernels that slide over the numbers would
average gradients of random sign. Each factor (``down`` or ``up`` of a target module) therefore has
directions of its own, and neighboring factors form a token. 1-D convolutions over these tokens
follow (2408.06740). At first, the convolutions add 0. After ``fit`` the autoencoder then is a
principal component analysis in two steps, from which training starts.
"""

from typing import TypedDict

import torch
from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout
from hyperlora.models.lora_projections import (
    FactorProjection,
    TokenProjection,
    list_factor_kinds,
)


class LoraAutoencoderConfig(TypedDict):
    """Arguments of a ``LoraAutoencoder`` besides its layout, as in ``config.json``."""

    directions_per_factor: int
    factors_per_token: int
    latent_width: int
    width: int
    depth: int
    kernel_size: int
    share_directions: bool
    variational: bool
    decoder_only: bool


class LoraAutoencoder(nn.Module):
    """Autoencoder of LoRAs: linear per factor, then convolutional over factors.

        u_f = x_f D_f,   g_t = [u_f for the factors f of token t]
        z_t = g_t J_t + conv_t(g A),   ĝ_t = z_t J'_tᵀ + conv'_t(z) A'_t

    D, J and A are linear and each position has its own; ``conv`` mixes neighboring tokens. The
    decoder has weights of its own.

    Letters of shapes: B LoRAs (batch), D numbers of a LoRA (``numel``), M factors, D_f numbers of
    factor f, K ``directions_per_factor``, G ``factors_per_token``, L tokens (M / G, rounded up), Z
    ``latent_width``.

    Args:
        layout: Target modules and rank of the LoRAs.
        directions_per_factor: K. Encoder and decoder have K ``numel`` numbers each for them.
        factors_per_token: G, neighbors in the order of the layout; 2 for one target module.
        latent_width: Z, numbers per token, at most G K.
        width: Channels of the convolutions.
        depth: Residual blocks of encoder and of decoder; 0 for a linear autoencoder.
        kernel_size: Tokens that a convolution sees, an odd number.
        share_directions: Whether target modules of one kind share directions, each with a
            rotation [K, K] of its own. A kind is a path without its numbers. This bounds the
            parameters for large bases.
        variational: Whether the encoder predicts a mean and a variance (β-VAE).
        decoder_only: Whether there is no encoder, as in models that only generate.
    """

    def __init__(
        self,
        layout: LoraLayout,
        directions_per_factor: int = 32,
        factors_per_token: int = 2,
        latent_width: int = 64,
        width: int = 128,
        depth: int = 2,
        kernel_size: int = 5,
        share_directions: bool = False,
        variational: bool = False,
        decoder_only: bool = False,
    ) -> None:
        super().__init__()
        self.layout, self.variational, self.latent_width = layout, variational, latent_width
        self.config: LoraAutoencoderConfig = {
            "directions_per_factor": directions_per_factor,
            "factors_per_token": factors_per_token,
            "latent_width": latent_width,
            "width": width,
            "depth": depth,
            "kernel_size": kernel_size,
            "share_directions": share_directions,
            "variational": variational,
            "decoder_only": False,
        }
        factor_kinds = list_factor_kinds(layout, share_directions)
        self.num_factors = len(factor_kinds)  # M
        self.num_tokens = -(-self.num_factors // factors_per_token)  # L, rounded up
        projection_sizes = (layout, factor_kinds, directions_per_factor)
        sizes = (self.num_tokens, factors_per_token * directions_per_factor)
        self.factor_encoder: FactorProjection | None = FactorProjection(*projection_sizes)
        self.token_encoder: TokenProjection | None = TokenProjection(*sizes, latent_width)
        self.token_decoder = TokenProjection(*sizes, latent_width)
        self.core_encoder = self.core_decoder = None
        if depth:
            self.core_encoder = _ConvEncoder(*sizes, latent_width, width, depth, kernel_size)
            self.core_decoder = _ConvDecoder(*sizes, latent_width, width, depth, kernel_size)
        self.factor_decoder = FactorProjection(*projection_sizes)
        self.logvar_head = nn.Conv1d(latent_width, latent_width, 1) if variational else None
        if self.logvar_head is not None:
            nn.init.zeros_(self.logvar_head.weight)
            nn.init.constant_(self.logvar_head.bias, -6.0)  # type: ignore[arg-type]
        if decoder_only:
            self.drop_encoder()

    def drop_encoder(self) -> None:
        """Remove the weights that only ``encode`` needs, about half of all."""
        self.factor_encoder = self.token_encoder = self.core_encoder = self.logvar_head = None
        self.config["decoder_only"] = True

    @property
    def compression(self) -> float:
        """Numbers of a LoRA per number of its latents."""
        return self.layout.numel / (self.num_tokens * self.latent_width)

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        """Set directions and tokens to principal components; the convolutions stay.

        Args:
            rows: Normalized LoRAs of mean 0, [n, numel]. If they span fewer directions, the
                others are left as they are.
        """
        factor_encoder, token_encoder = self._get_encoders()
        factor_encoder.fit(rows)
        token_encoder.fit(self._group(factor_encoder.encode(rows)))
        # the directions are orthonormal, so the transpose undoes them
        self.factor_decoder.load_state_dict(factor_encoder.state_dict())
        self.token_decoder.load_state_dict(token_encoder.state_dict())

    def encode_moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Predict mean and log-variance of the latents.

        Args:
            rows: Flat, normalized LoRAs (``LoraNormalizer``), [batch, numel].

        Returns:
            Mean and log-variance, each [batch, num_tokens, latent_width]. The latter is -inf
            unless variational.

        Raises:
            InvalidArgumentError: There is no encoder.
        """
        factor_encoder, token_encoder = self._get_encoders()
        groups = self._group(factor_encoder.encode(rows))  # g [B, L, G K]
        mean = token_encoder.encode(groups)  # μ [B, L, Z]
        if self.core_encoder is not None:
            mean = mean + self.core_encoder(groups)
        if self.logvar_head is None:
            return mean, torch.full_like(mean, -torch.inf)  # σ² = 0
        logvar = self.logvar_head(mean.mT).mT  # log σ² [B, L, Z]
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
        groups = self.token_decoder.decode(latents)  # ĝ [B, L, G K]
        if self.core_decoder is not None:
            groups = groups + self.core_decoder(latents)
        num_directions = self.config["directions_per_factor"]
        coefficients = groups.flatten(1).unflatten(1, (-1, num_directions))  # [B, L G, K]
        # without the padding of the last token: û [B, M, K] to x̂ [B, D]
        return self.factor_decoder.decode(coefficients[:, : self.num_factors])

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

    def _get_encoders(self) -> tuple[FactorProjection, TokenProjection]:
        """Return the linear layers of the encoder; raise if there are none."""
        if self.factor_encoder is None or self.token_encoder is None:
            raise InvalidArgumentError(
                "this LoRA autoencoder only decodes: use the codec that its model was trained with"
            )
        return self.factor_encoder, self.token_encoder

    def _group(self, coefficients: Tensor) -> Tensor:
        """[batch, num_factors, K] to [batch, num_tokens, G K]; missing factors are 0."""
        num_padding = self.num_tokens * self.config["factors_per_token"] - self.num_factors
        padded = nn.functional.pad(coefficients, (0, 0, 0, num_padding))  # [B, L G, K]
        return padded.flatten(1).unflatten(1, (self.num_tokens, -1))


class _ConvEncoder(nn.Module):
    """Convolutions over groups, from [batch, num_tokens, G K] to [batch, num_tokens, Z].

    Args:
        num_tokens: L.
        group_width: G K.
        latent_width: Z.
        width: c, channels.
        depth: Residual blocks.
        kernel_size: Of their first convolution.
    """

    def __init__(
        self,
        num_tokens: int,
        group_width: int,
        latent_width: int,
        width: int,
        depth: int,
        kernel_size: int,
    ) -> None:
        super().__init__()
        self.proj_in = nn.Parameter(torch.randn(num_tokens, group_width, width) * group_width**-0.5)
        self.blocks = _make_conv_blocks(width, depth, kernel_size)
        self.conv_out = _make_zero_conv(width, latent_width)

    def forward(self, groups: Tensor) -> Tensor:
        """Return what neighboring groups add to the latents; 0 at initialization."""
        h = torch.einsum("bld,ldc->bcl", groups, self.proj_in)  # [B, c, L]
        for block in self.blocks:
            h = h + block(h)  # [B, c, L]
        return self.conv_out(h).mT  # [B, L, Z]


class _ConvDecoder(nn.Module):
    """Convolutions over latents, from [batch, num_tokens, Z] to [batch, num_tokens, G K].

    Args:
        num_tokens: L.
        group_width: G K.
        latent_width: Z.
        width: c, channels.
        depth: Residual blocks.
        kernel_size: Of their first convolution.
    """

    def __init__(
        self,
        num_tokens: int,
        group_width: int,
        latent_width: int,
        width: int,
        depth: int,
        kernel_size: int,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(latent_width, width, 1)
        self.blocks = _make_conv_blocks(width, depth, kernel_size)
        self.proj_out = nn.Parameter(torch.zeros(num_tokens, width, group_width))

    def forward(self, latents: Tensor) -> Tensor:
        """Return what neighboring latents add to the groups; 0 at initialization."""
        h = self.conv_in(latents.mT)  # [B, c, L]
        for block in self.blocks:
            h = h + block(h)  # [B, c, L]
        return torch.einsum("bcl,lcd->bld", h, self.proj_out)


def _make_conv_blocks(width: int, depth: int, kernel_size: int) -> nn.ModuleList:
    """Residual blocks [batch, width, num_tokens], each with a kernel over neighboring tokens."""
    return nn.ModuleList(
        nn.Sequential(
            nn.GroupNorm(1, width),
            nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2),
            nn.GELU(),
            nn.Conv1d(width, width, 1),
        )
        for _ in range(depth)
    )


def _make_zero_conv(in_channels: int, out_channels: int) -> nn.Conv1d:
    """A convolution of kernel size 1 whose output is 0 at initialization."""
    conv = nn.Conv1d(in_channels, out_channels, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


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
