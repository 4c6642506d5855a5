"""The networks of HyperLoRA (2503.16944): from a face to the coefficients of LoRA bases.

    embedding ── IdProjector ── x ┐
                                  ├─ HyperLoraResampler ── coefficients ── mix_basis ── down, up
    CLIP tokens ────────────── y ─┘

Attribute names are those of the released files. Shapes in comments: B photos, Q queries, D the
width of the resampler, K the size of a basis, r the rank.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_DIM = 64
"""Width of an attention head; shapes do not tell it."""
NUM_ROWS_PER_ATTENTION = 8
"""Rows of coefficients of one attention: down and up of query, key, value and output."""
_NORM_EPS = 1e-8


class IdProjector(nn.Sequential):
    """A face embedding as tokens.

    Args:
        embedding_dim: Width of the embedding.
        num_tokens: Tokens per face.
        token_dim: Width of a token.
    """

    def __init__(self, embedding_dim: int, num_tokens: int, token_dim: int) -> None:
        super().__init__(
            nn.Linear(embedding_dim, num_tokens * token_dim),
            nn.Unflatten(-1, (num_tokens, token_dim)),
            nn.LayerNorm(token_dim),
        )


class _Attention(nn.Module):
    """Attention from queries to keys and values of another sequence, without biases."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.num_heads = inner_dim // HEAD_DIM
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_k = nn.Linear(dim, inner_dim, bias=False)
        self.to_v = nn.Linear(dim, inner_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, dim, bias=False)])

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Attend from queries [B, n, D] to the context [B, m, D]; return [B, n, D]."""
        q, k, v = (
            linear(tokens).unflatten(-1, (self.num_heads, HEAD_DIM)).transpose(1, 2)
            for linear, tokens in (
                (self.to_q, queries),
                (self.to_k, context),
                (self.to_v, context),
            )
        )  # [B, heads, n or m, 64] each
        x = F.scaled_dot_product_attention(q, k, v)  # softmax(q kᵀ / 8) v
        output: Tensor = self.to_out[0](x.transpose(1, 2).flatten(-2))
        return output


class _GeluProjection(nn.Module):
    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, D] to [B, n, inner]."""
        return F.gelu(self.proj(x))


class _FeedForward(nn.Module):
    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            _GeluProjection(dim, inner_dim), nn.Identity(), nn.Linear(inner_dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, D] to [B, n, D]."""
        output: Tensor = self.net(x)
        return output


class _Layer(nn.Module):
    """Self-attention, attention to the ID tokens, attention to the CLIP tokens, feed-forward."""

    def __init__(self, dim: int, inner_dim: int, ff_dim: int) -> None:
        super().__init__()
        self.norm_attn1 = nn.LayerNorm(dim)
        self.attn1 = _Attention(dim, inner_dim)
        self.norm_attn2_l, self.norm_attn2_x = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn2 = _Attention(dim, inner_dim)
        self.norm_attn3_l, self.norm_attn3_y = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn3 = _Attention(dim, inner_dim)
        self.norm_ff = nn.LayerNorm(dim)
        self.ff = _FeedForward(dim, ff_dim)

    def forward(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Update z [B, Q, D] with the ID tokens x [B, n, D] and the CLIP tokens y [B, m, D]."""
        normed = self.norm_attn1(z)
        z = z + self.attn1(normed, normed)
        z = z + self.attn2(self.norm_attn2_l(z), self.norm_attn2_x(x))
        z = z + self.attn3(self.norm_attn3_l(z), self.norm_attn3_y(y))
        return z + self.ff(self.norm_ff(z))


class HyperLoraResampler(nn.Module):
    """From ID tokens and CLIP tokens of a photo to rows of coefficients.

    Args:
        num_queries: Rows of coefficients, 8 per adapted attention.
        dim: Width D.
        id_dim: Width of the ID tokens.
        clip_dim: Width of the CLIP tokens.
        inner_dim: Width of all heads together.
        ff_dim: Width of the feed-forward layers.
        num_layers: Layers.
        basis_size: Coefficients per row, K.
    """

    def __init__(
        self,
        num_queries: int,
        dim: int,
        id_dim: int,
        clip_dim: int,
        inner_dim: int,
        ff_dim: int,
        num_layers: int,
        basis_size: int,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, num_queries, dim))
        self.proj_in = nn.Linear(id_dim, dim)
        self.proj_in_2 = nn.Linear(clip_dim, dim)
        self.layers = nn.ModuleList(_Layer(dim, inner_dim, ff_dim) for _ in range(num_layers))
        self.proj_out = nn.Linear(dim, basis_size)

    def forward(self, id_tokens: Tensor, clip_tokens: Tensor) -> Tensor:
        """Compute the coefficients of each photo.

        Args:
            id_tokens: [B, tokens, id_dim], of ``IdProjector``.
            clip_tokens: [B, tokens, clip_dim], the last hidden states but one of CLIP's vision
                model, without its last norm.

        Returns:
            [B, Q, K], not normalized yet.
        """
        x = self.proj_in(id_tokens)  # [B, n, D]
        y = self.proj_in_2(clip_tokens)  # [B, m, D]
        z = self.latents.expand(len(x), -1, -1)  # [B, Q, D]
        for layer in self.layers:
            z = layer(z, x, y)
        coefficients: Tensor = self.proj_out(z)
        return coefficients


def join_photos(coefficients: Tensor) -> Tensor:
    """Average the coefficients of the photos of one subject, and normalize each row.

    Args:
        coefficients: [photos, Q, K].

    Returns:
        [Q, K]; rows have length 1.
    """
    mean = coefficients.mean(0)
    return mean / (mean.square().sum(-1, keepdim=True) + _NORM_EPS).sqrt()


def mix_basis(coefficients: Tensor, basis: Tensor) -> Tensor:
    """Compute one factor of a LoRA, Σᵢ cᵢ Bᵢ, transposed to the shape that LoRA files have.

    Args:
        coefficients: One row per subject, [subjects, K].
        basis: [K, in, r] for ``down``, [K, r, out] for ``up``.

    Returns:
        [subjects, r, in] or [subjects, out, r].
    """
    mixed = coefficients @ basis.flatten(1)  # [subjects, in * r]
    return mixed.unflatten(-1, basis.shape[1:]).transpose(-1, -2)
