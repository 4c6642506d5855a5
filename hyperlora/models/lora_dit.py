"""``LoraDiT``: a diffusion transformer over the latents of LoRAs (DiT, 2212.09748).

Flow matching (2210.02747) between a LoRA's latents x and noise ε:

    x_t = (1 - t) x + t ε,      dx_t/dt = v = ε - x = (x_t - x) / t

Integrating from t = 1 to 0 samples a LoRA. The network predicts x (2511.13720): latents lie near a
low-dimensional subspace, noise does not, and a narrow network cannot represent the noise.

With an estimate m of E[x | photos] (``LatentRegression``), the network predicts x - t m: at t = 1
it corrects m, and near t = 0 x_t tells more than m.
"""

from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.features import ImageFeatures


class LoraDiTConfig(TypedDict):
    """Arguments of a ``LoraDiT`` besides the shapes of its input, as in ``config.json``."""

    width: int
    depth: int
    num_heads: int
    per_token_projections: bool


class LoraDiT(nn.Module):
    """Diffusion transformer conditioned on the tokens of photos.

    Each block has self-attention, cross-attention to the photos' tokens and an MLP. The time and
    the mean of the photos' tokens scale, shift and gate all three (adaLN-zero), so every block
    starts as the identity. A learned null token stands for no condition, for classifier-free
    guidance. At initialization the network predicts x = 0.

    Letters of shapes: B samples (batch), L tokens of the latents, Z ``latent_width``, V views
    (photos of one subject), N tokens per view, F ``condition_width``, d ``width``, H heads, e
    numbers per head (d / H).

    Args:
        num_tokens: Tokens of a LoRA's latents.
        latent_width: Width of these tokens.
        condition_width: Width of the photos' tokens.
        width: Of the transformer.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        per_token_projections: Whether the first and the last layer have weights of their own for
            each token. The numbers of two tokens of a LoRA have nothing in common, so shared
            weights learn slowly.
    """

    def __init__(
        self,
        num_tokens: int,
        latent_width: int,
        condition_width: int,
        width: int = 192,
        depth: int = 6,
        num_heads: int = 6,
        per_token_projections: bool = False,
    ) -> None:
        super().__init__()
        self.num_tokens, self.latent_width = num_tokens, latent_width
        self.config: LoraDiTConfig = {
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "per_token_projections": per_token_projections,
        }
        self.x_embedder = (
            _TokenLinear(num_tokens, latent_width, width)
            if per_token_projections
            else nn.Linear(latent_width, width)
        )
        # learned, since neighboring tokens are not alike as the patches of an image are
        self.pos_embed = nn.Parameter(torch.randn(num_tokens, width) * 0.02)  # [L, d]
        # 256 numbers of the sinusoidal embedding, as in the code of DiT
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Sequential(
            nn.LayerNorm(condition_width), nn.Linear(condition_width, width)
        )
        self.null_token = nn.Parameter(torch.randn(1, width) * 0.02)  # [1, d]
        self.blocks = nn.ModuleList(_DiTBlock(width, num_heads) for _ in range(depth))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), _make_zero_linear(width, 2 * width))
        self.final_layer = (
            _TokenLinear(num_tokens, width, latent_width, is_zero=True)
            if per_token_projections
            else _make_zero_linear(width, latent_width)
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        photo_features: ImageFeatures,
        drop_mask: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> Tensor:
        """Predict the clean latents.

        Args:
            x: Noisy latents x_t, [batch, num_tokens, latent_width].
            t: Times from 0 (clean) to 1 (noise), [batch].
            photo_features: Tokens [batch, views, n, condition_width].
            drop_mask: Samples without condition, bool [batch]; None conditions all of them.
            mean: m, shaped like ``x``; 0 for samples without condition. None for 0.

        Returns:
            Predicted x, [batch, num_tokens, latent_width].
        """
        cond_tokens = self.y_embedder(photo_features.flatten_views())  # [B, V·N, d]
        if drop_mask is not None:
            null_tokens = self.null_token.expand_as(cond_tokens)  # [B, V·N, d]
            # mask [B, 1, 1]: a sample loses all of its photos at once, so c has none either
            cond_tokens = torch.where(drop_mask[:, None, None], null_tokens, cond_tokens)
        t_embed = self.t_embedder(_compute_timestep_embedding(t))  # [B, 256] to [B, d]
        c = t_embed + cond_tokens.mean(1)  # where DiT adds the embedding of a class, [B, d]
        h = self.x_embedder(x) + self.pos_embed  # [B, L, d]
        for block in self.blocks:
            h = block(h, cond_tokens, c)  # [B, L, d]
        # stored weights have scale first; DiT has shift first
        scale, shift = self.adaLN_modulation(c).chunk(2, -1)  # each [B, d]
        pred_x0: Tensor = self.final_layer(_modulate(h, shift, scale))  # [B, L, Z]
        if mean is None:
            return pred_x0
        if drop_mask is not None:
            mean = torch.where(drop_mask[:, None, None], torch.zeros_like(mean), mean)
        return pred_x0 + t.view(-1, 1, 1) * mean

    @torch.no_grad()
    def sample(
        self,
        photo_features: ImageFeatures,
        noise: Tensor,
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
        mean: Tensor | None = None,
    ) -> Tensor:
        """Sample latents by Euler's method from t = 1 to 0.

        Let x be the prediction at x_t = x_(n / N), with n steps left. A step of 1 / N is
        x_t - v / N = x_t + (x - x_t) / n. The last step therefore ends on the prediction, and with
        a single step the result is the prediction from noise alone.

        Args:
            photo_features: Tokens [batch, views, n, condition_width].
            noise: x_1, [batch, num_tokens, latent_width].
            num_inference_steps: N, steps of equal size.
            guidance_scale: w of x_uncond + w (x_cond - x_uncond) (2207.12598, eq. 6); 1 for the
                conditional prediction alone, at half the cost.
            mean: m, shaped like ``noise``; None for 0.

        Returns:
            Latents, [batch, num_tokens, latent_width].
        """
        x_t, batch_size = noise, len(noise)  # [B, L, Z]
        for i in range(num_inference_steps):
            # t = n / N with n = N - i steps left
            t = x_t.new_full((batch_size,), 1 - i / num_inference_steps)  # [B]
            if guidance_scale == 1:
                pred_x0 = self(x_t, t, photo_features, mean=mean)  # [B, L, Z]
            else:
                # one pass over [2·B, ...]: the first half sees the photos, the second does not
                doubled_features = ImageFeatures(photo_features.tokens.repeat(2, 1, 1, 1))
                drop_mask = torch.arange(2 * batch_size, device=x_t.device) >= batch_size  # [2·B]
                doubled_mean = None if mean is None else mean.repeat(2, 1, 1)
                doubled_x0 = self(
                    x_t.repeat(2, 1, 1), t.repeat(2), doubled_features, drop_mask, doubled_mean
                )
                cond_x0, uncond_x0 = doubled_x0.chunk(2)  # each [B, L, Z]
                # The paper guides ε, with 1 + w for this w. At one x_t, ε is affine in x and the
                # weights w and 1 - w add up to 1, so to guide x is the same.
                pred_x0 = uncond_x0 + guidance_scale * (cond_x0 - uncond_x0)  # [B, L, Z]
            x_t = x_t + (pred_x0 - x_t) / (num_inference_steps - i)  # [B, L, Z]
        return x_t


class _DiTBlock(nn.Module):
    """Self-attention, cross-attention and MLP, each with adaLN-zero (2212.09748, §3.2).

    Letters of shapes: those of ``LoraDiT``; L queries, and S keys (L, or V·N photo tokens).

    Args:
        width: Of all tokens.
        num_heads: Heads of both attentions.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)  # one product gives queries, keys and values
        self.attn_out = nn.Linear(width, width)
        self.cross_q = nn.Linear(width, width)
        self.cross_kv = nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        # 9 vectors: scale, shift and gate of three sublayers. All are 0 at first, so h is kept.
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), _make_zero_linear(width, 9 * width))

    def forward(self, h: Tensor, cond_tokens: Tensor, c: Tensor) -> Tensor:
        """Run the block.

        Args:
            h: [batch, tokens, width].
            cond_tokens: [batch, n, width].
            c: Conditioning vector, [batch, width].

        Returns:
            [batch, tokens, width].
        """
        # each [B, d]
        (
            scale_attn,
            shift_attn,
            gate_attn,
            scale_cross,
            shift_cross,
            gate_cross,
            scale_mlp,
            shift_mlp,
            gate_mlp,
        ) = self.adaLN_modulation(c).chunk(9, -1)

        # three times h ← h + gate ⊙ sublayer(LN(h) (1 + scale) + shift), the gate as [B, 1, d]
        x = _modulate(h, shift_attn, scale_attn)  # [B, L, d]
        q, k, v = self.qkv(x).chunk(3, -1)  # each [B, L, d]
        h = h + gate_attn[:, None] * self.attn_out(self._compute_attention(q, k, v))  # [B, L, d]

        x = _modulate(h, shift_cross, scale_cross)  # [B, L, d]
        k, v = self.cross_kv(cond_tokens).chunk(2, -1)  # not modulated, each [B, V·N, d]
        attn_output = self._compute_attention(self.cross_q(x), k, v)  # [B, L, d]
        h = h + gate_cross[:, None] * self.cross_out(attn_output)  # [B, L, d]

        x = _modulate(h, shift_mlp, scale_mlp)  # [B, L, d]
        return h + gate_mlp[:, None] * self.mlp(x)  # [B, L, d]

    def _compute_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Multi-head attention of q [batch, tokens, width] to k and v [batch, n, width]."""
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, L or S, e]
            for x in (q, k, v)
        )
        # softmax(q kᵀ / √e) v (1706.03762, eq. 1), with attention weights [B, H, L, S]
        attn_output = F.scaled_dot_product_attention(q, k, v)  # [B, H, L, e]
        return attn_output.transpose(1, 2).flatten(2)  # [B, L, H·e] = [B, L, d]


class _TokenLinear(nn.Module):
    """A linear layer with weights of its own for each token.

    Args:
        num_tokens: L.
        in_features: Numbers per token.
        out_features: Numbers per token of the result.
        is_zero: Whether the output is 0 at initialization.
    """

    def __init__(
        self, num_tokens: int, in_features: int, out_features: int, is_zero: bool = False
    ) -> None:
        super().__init__()
        std = 0.0 if is_zero else in_features**-0.5
        self.weight = nn.Parameter(torch.randn(num_tokens, in_features, out_features) * std)
        self.bias = nn.Parameter(torch.zeros(num_tokens, out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [batch, num_tokens, in_features] to [batch, num_tokens, out_features]."""
        return torch.einsum("bli,lio->blo", x, self.weight) + self.bias


def interpolate_noise(noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Compute x_t = (1 - t) x + t ε.

    Args:
        noise: ε, shaped like ``x``.
        x: Clean latents, [batch, ...].
        t: Times from 0 to 1, [batch].

    Returns:
        x_t, shaped like ``x``.
    """
    t_broadcast = t.view(-1, *[1] * (x.ndim - 1))  # [B, 1, ...], one time per sample
    return (1 - t_broadcast) * x + t_broadcast * noise


def _make_zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer whose output is 0 at initialization."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift; x [batch, tokens, width], the others [batch, width]."""
    # no weights of its own in the norm: scale and shift take their place, as [B, 1, d]
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]


def _compute_timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 1e4) -> Tensor:
    """Cosines and sines of 1000 t at ``dim`` / 2 frequencies, [batch, dim]; t [batch] in [0, 1]."""
    # ω_i = 10000^(-2 i / dim) as in 1706.03762, §3.5, for i = 0 ... dim / 2 - 1
    frequencies = [max_period ** (-i / (dim // 2)) for i in range(dim // 2)]
    # 1000 t, since these frequencies are made for the steps 0 ... 999 of DDPM
    angles = 1000 * t.float()[:, None] * torch.tensor(frequencies, device=t.device)  # [B, 128]
    return torch.cat([angles.cos(), angles.sin()], -1)  # cosines first, as in DiT; [B, 256]
