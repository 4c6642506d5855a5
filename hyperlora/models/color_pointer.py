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
        self.color_proj = nn.Linear(6, _HEAD_DIM, bias=False)
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
        before_pixels = _flatten_pixels(before)  # [batch, views, pixels, 3]
        after_pixels = _flatten_pixels(after)  # [batch, views, pixels, 3]
        colors = torch.cat([after_pixels, after_pixels - before_pixels], -1)
        keys = self.pos_embed + self.color_proj(colors)  # [batch, views, pixels, head_dim]
        queries = self.to_q(hidden_states).unflatten(-1, (self.num_queries, -1))
        # queries [batch, num_queries, head_dim]
        attn_logits = torch.einsum("bqd,bvpd->bvqp", queries, keys)
        attn_weights = attn_logits.softmax(-1)  # [batch, views, num_queries, pixels]
        attn_output = torch.einsum("bvqp,bvpc->bqc", attn_weights, after_pixels)
        attn_output = attn_output / after_pixels.shape[1]  # [batch, num_queries, 3]
        return [attn_output[:, i] @ out_weight for i, out_weight in enumerate(self.to_out)]


def _flatten_pixels(patches: Tensor) -> Tensor:
    """[batch, views, num_patches, 3 * patch_pixels²] to [batch, views, pixels, 3]."""
    return patches.unflatten(-1, (3, -1)).mT.flatten(2, 3)
