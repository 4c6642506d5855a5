"""``LoraDenoiser``: a diffusion transformer over the latents of LoRAs (DiT, 2212.09748, under DiffLoRA's conditions).

Flow matching (2210.02747): x_t = (1 - t) x + t ε; dx/dt = v = ε - x = (x_t - x) / t from t = 1 to 0 makes a LoRA. The
network says x (2511.13720): latents lie near few directions, noise in all of them, and a narrow network can name the
former but not carry the latter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.features import ImageFeatures


class LoraDenoiser(nn.Module):
    """Latents [batch, tokens, latent_width] at times [batch] in [0, 1], and what photos say, to clean latents.

    Blocks of self-attention, cross-attention to the photos' tokens and a feed-forward layer; the time (and the mean of
    the photos' tokens) scales, shifts and gates each (AdaLN-zero), so every block begins as the identity. A learned
    token stands for no condition, for classifier-free guidance. At initialisation it expects x = 0.
    """

    def __init__(
        self,
        tokens: int,
        latent_width: int,
        condition_width: int,
        width: int = 192,
        depth: int = 6,
        heads: int = 6,
    ) -> None:
        super().__init__()
        self.tokens, self.latent_width = tokens, latent_width
        self.config: dict[str, Any] = {"width": width, "depth": depth, "heads": heads}
        self.enter = nn.Linear(latent_width, width)
        self.places = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Sequential(nn.LayerNorm(condition_width), nn.Linear(condition_width, width))
        self.nothing = nn.Parameter(torch.randn(1, width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.modulate = nn.Sequential(nn.SiLU(), _silent(width, 2 * width))
        self.leave = _silent(width, latent_width)

    def forward(self, x: Tensor, t: Tensor, photos: ImageFeatures, dropped: Tensor | None = None) -> Tensor:
        """``dropped`` [batch], bool: samples that are told nothing of their photos."""
        seen = self.condition(photos.joined())  # [batch, views * n, width]
        if dropped is not None:
            seen = torch.where(dropped[:, None, None], self.nothing.expand_as(seen), seen)
        how = self.time(_waves(t)) + seen.mean(1)  # [batch, width]
        h = self.enter(x) + self.places
        for block in self.blocks:
            h = block(h, seen, how)
        scale, shift = self.modulate(how)[:, None].chunk(2, -1)
        return self.leave(_normed(h) * (1 + scale) + shift)

    @torch.no_grad()
    def sample(self, photos: ImageFeatures, noise: Tensor, steps: int = 10, guidance: float = 1.0) -> Tensor:
        """Latents from ``noise`` [batch, tokens, latent_width] by Euler's method in ``steps`` equal steps; at
        ``guidance`` w, x = x_none + w (x - x_none) (2207.12598, eq. 6; v likewise). The last step ends on what the
        network says, and a single one is its guess from noise alone."""
        x, n = noise, len(noise)
        for i in range(steps):
            t = x.new_full((n,), 1 - i / steps)
            if guidance == 1:
                clean = self(x, t, photos)
            else:
                both = ImageFeatures(photos.tokens.repeat(2, 1, 1, 1))
                without = torch.arange(2 * n, device=x.device) >= n
                clean, plain = self(x.repeat(2, 1, 1), t.repeat(2), both, without).chunk(2)
                clean = plain + guidance * (clean - plain)
            x = x + (clean - x) / (steps - i)
        return x


class _Block(nn.Module):
    """[batch, tokens, width], conditioned by [batch, n, width] tokens and [batch, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query, self.seen, self.back = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulate = nn.Sequential(nn.SiLU(), _silent(width, 9 * width))

    def forward(self, h: Tensor, seen: Tensor, how: Tensor) -> Tensor:
        a, b, c = (part.chunk(3, -1) for part in self.modulate(how)[:, None].chunk(3, -1))
        x = _normed(h) * (1 + a[0]) + a[1]
        h = h + a[2] * self.out(self._attend(*self.qkv(x).chunk(3, -1)))
        x = _normed(h) * (1 + b[0]) + b[1]
        h = h + b[2] * self.back(self._attend(self.query(x), *self.seen(seen).chunk(2, -1)))
        x = _normed(h) * (1 + c[0]) + c[1]
        return h + c[2] * self.feed(x)

    def _attend(self, *qkv: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def mixed_with(noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """x_t at times ``t`` [batch] in [0, 1]."""
    at = t.view(-1, *[1] * (x.ndim - 1))
    return (1 - at) * x + at * noise


def _silent(fan_in: int, fan_out: int) -> nn.Linear:
    """A layer that says 0 at initialisation."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _waves(t: Tensor, width: int = 256, longest: float = 1e4) -> Tensor:
    """Sinusoids of ``t`` in [0, 1], [batch, width]."""
    rates: Sequence[float] = [longest ** (-i / (width // 2)) for i in range(width // 2)]
    angles = 1000 * t.float()[:, None] * torch.tensor(rates, device=t.device)
    return torch.cat([angles.cos(), angles.sin()], -1)
