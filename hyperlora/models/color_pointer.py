"""``ColorPointer``: attention that copies colors from the pixels of an image."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

_HEAD_DIM: Final = 16
"""Width of queries and keys. A key holds position, color and change of color, so few suffice."""


class ColorPointer(nn.Module):
    """One attention query per color space over the pixels of a small image, with a linear output.

    The network thus reads the exact color from the edited image A', instead of remembering it:

        k_p = pos_p + W [rgb'_p, rgb'_p - rgb_p],   y_q = (Σ_p softmax(q · k_p) rgb'_p) O_q

    rgb and rgb' are the pixels of the original and the edited image. All outputs are 0 at
    initialization. The pixels are those that ``TimmEncoder(patch_pixels=...)`` appends to its
    tokens.

    Letters of shapes: B edits (batch), V views (pairs of one edit), P ``num_patches``, p
    ``patch_pixels``, X = P·p² pixels per image, Q queries, e width of queries and keys, d
    ``hidden_size``.

    Args:
        hidden_size: Width of the vector that the queries are made of.
        num_patches: Patches per image.
        patch_pixels: Pixels per patch along each axis.
        output_sizes: Width of each query's output; their number is the number of queries.
    """

    def __init__(
        self, hidden_size: int, num_patches: int, patch_pixels: int, output_sizes: Sequence[int]
    ) -> None:
        super().__init__()
        self.num_queries = len(output_sizes)
        self.to_q = nn.Linear(hidden_size, self.num_queries * _HEAD_DIM)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(num_patches * patch_pixels**2, _HEAD_DIM))
        self.color_proj = nn.Linear(6, _HEAD_DIM, bias=False)  # W; pos_embed is its bias per pixel
        # O_q, one [3, output_size] per query; 0, so the head's logits are its classifier's at first
        self.to_out = nn.ParameterList(torch.zeros(3, output_size) for output_size in output_sizes)

    def forward(self, hidden_states: Tensor, before: Tensor, after: Tensor) -> list[Tensor]:
        """Read one color per query, averaged over the views.

        Args:
            hidden_states: [batch, hidden_size].
            before: Pixels of the original image, [batch, views, num_patches, 3 * patch_pixels²].
            after: Pixels of the edited image, of the same shape.

        Returns:
            For each query its output, [batch, output_size].
        """
        before_pixels = _flatten_pixels(before)  # rgb [B, V, X, 3]
        after_pixels = _flatten_pixels(after)  # rgb' [B, V, X, 3]
        # the difference shows which pixels the edit changed
        colors = torch.cat([after_pixels, after_pixels - before_pixels], -1)  # [B, V, X, 6]
        keys = self.pos_embed + self.color_proj(colors)  # k [B, V, X, e]
        queries = self.to_q(hidden_states).unflatten(-1, (self.num_queries, -1))  # q [B, Q, e]
        # q · k without the 1 / √e of 1706.03762, eq. 1: to_q learns its scale
        attn_logits = torch.einsum("bqe,bvxe->bvqx", queries, keys)  # [B, V, Q, X]
        attn_weights = attn_logits.softmax(-1)  # over the pixels of one view, [B, V, Q, X]
        # summed over pixels and views, [B, Q, 3], then divided by V: a mean over the views
        attn_output = torch.einsum("bvqx,bvxc->bqc", attn_weights, after_pixels)
        attn_output = attn_output / after_pixels.shape[1]  # [B, Q, 3]
        # each [B, output_size]
        return [attn_output[:, i] @ out_weight for i, out_weight in enumerate(self.to_out)]


def _flatten_pixels(patches: Tensor) -> Tensor:
    """[batch, views, num_patches, 3 * patch_pixels²] to [batch, views, pixels, 3]."""
    # pixel_unshuffle stores a patch channel by channel: [B, V, P, 3, p²], then [B, V, P, p², 3]
    return patches.unflatten(-1, (3, -1)).mT.flatten(2, 3)
