"""``LoraDiT``: a diffusion transformer over the latents of LoRAs (DiT, 2212.09748, under DiffLoRA's conditions).

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


class LoraDiT(nn.Module):
    """Latents [batch, tokens, latent_width] at times [batch] in [0, 1], and what photos say, to clean latents.

    Blocks of self-attention, cross-attention to the photos' tokens and a feed-forward layer; the time (and the mean of
    the photos' tokens) scales, shifts and gates each (AdaLN-zero), so every block begins as the identity. A learned
    token stands for no condition, for classifier-free guidance. At initialisation it expects x = 0.
    """

    def __init__(
        self,
        num_tokens: int,
        latent_width: int,
        condition_width: int,
        width: int = 192,
        depth: int = 6,
        num_heads: int = 6,
    ) -> None:
        super().__init__()
        self.num_tokens, self.latent_width = num_tokens, latent_width
        self.config: dict[str, Any] = {"width": width, "depth": depth, "heads": num_heads}
        self.x_embedder = nn.Linear(latent_width, width)
        self.pos_embed = nn.Parameter(torch.randn(num_tokens, width) * 0.02)
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Sequential(
            nn.LayerNorm(condition_width), nn.Linear(condition_width, width)
        )
        self.null_token = nn.Parameter(torch.randn(1, width) * 0.02)
        self.blocks = nn.ModuleList(_DiTBlock(width, num_heads) for _ in range(depth))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), _make_zero_linear(width, 2 * width))
        self.final_layer = _make_zero_linear(width, latent_width)

    def forward(
        self, x: Tensor, t: Tensor, photo_features: ImageFeatures, drop_mask: Tensor | None = None
    ) -> Tensor:
        """``drop_mask`` [batch], bool: samples that are told nothing of their photos."""
        cond_tokens = self.y_embedder(photo_features.flatten_views())  # [batch, views * n, width]
        if drop_mask is not None:
            cond_tokens = torch.where(
                drop_mask[:, None, None], self.null_token.expand_as(cond_tokens), cond_tokens
            )
        cond_embed = self.t_embedder(_get_timestep_embedding(t)) + cond_tokens.mean(
            1
        )  # [batch, width]
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, cond_tokens, cond_embed)
        scale, shift = self.adaLN_modulation(cond_embed)[:, None].chunk(2, -1)
        return self.final_layer(_apply_layer_norm(h) * (1 + scale) + shift)

    @torch.no_grad()
    def sample(
        self,
        photo_features: ImageFeatures,
        noise: Tensor,
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Latents from ``noise`` [batch, tokens, latent_width] by Euler's method in ``num_inference_steps`` equal steps; at
        ``guidance_scale`` w, x = x_none + w (x - x_none) (2207.12598, eq. 6; v likewise). The last step ends on what the
        network says, and a single one is its guess from noise alone."""
        x, batch_size = noise, len(noise)
        for i in range(num_inference_steps):
            t = x.new_full((batch_size,), 1 - i / num_inference_steps)
            if guidance_scale == 1:
                pred_x0 = self(x, t, photo_features)
            else:
                doubled_features = ImageFeatures(photo_features.tokens.repeat(2, 1, 1, 1))
                drop_mask = torch.arange(2 * batch_size, device=x.device) >= batch_size
                pred_x0, uncond_x0 = self(
                    x.repeat(2, 1, 1), t.repeat(2), doubled_features, drop_mask
                ).chunk(2)
                pred_x0 = uncond_x0 + guidance_scale * (pred_x0 - uncond_x0)
            x = x + (pred_x0 - x) / (num_inference_steps - i)
        return x


class _DiTBlock(nn.Module):
    """[batch, tokens, width], conditioned by [batch, n, width] tokens and [batch, width]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.attn_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross_q, self.cross_kv, self.cross_out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), _make_zero_linear(width, 9 * width))

    def forward(self, h: Tensor, cond_tokens: Tensor, cond_embed: Tensor) -> Tensor:
        attn_modulation, cross_modulation, mlp_modulation = (
            modulation.chunk(3, -1)
            for modulation in self.adaLN_modulation(cond_embed)[:, None].chunk(3, -1)
        )
        x = _apply_layer_norm(h) * (1 + attn_modulation[0]) + attn_modulation[1]
        h = h + attn_modulation[2] * self.attn_out(
            self._compute_attention(*self.qkv(x).chunk(3, -1))
        )
        x = _apply_layer_norm(h) * (1 + cross_modulation[0]) + cross_modulation[1]
        h = h + cross_modulation[2] * self.cross_out(
            self._compute_attention(self.cross_q(x), *self.cross_kv(cond_tokens).chunk(2, -1))
        )
        x = _apply_layer_norm(h) * (1 + mlp_modulation[0]) + mlp_modulation[1]
        return h + mlp_modulation[2] * self.mlp(x)

    def _compute_attention(self, *qkv: Tensor) -> Tensor:
        q, k, v = (
            projection.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for projection in qkv
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def interpolate_noise(noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """x_t at times ``t`` [batch] in [0, 1]."""
    t_broadcast = t.view(-1, *[1] * (x.ndim - 1))
    return (1 - t_broadcast) * x + t_broadcast * noise


def _make_zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A layer that says 0 at initialisation."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _apply_layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _get_timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 1e4) -> Tensor:
    """Sinusoids of ``t`` in [0, 1], [batch, width]."""
    frequencies: Sequence[float] = [max_period ** (-i / (dim // 2)) for i in range(dim // 2)]
    angles = 1000 * t.float()[:, None] * torch.tensor(frequencies, device=t.device)
    return torch.cat([angles.cos(), angles.sin()], -1)
