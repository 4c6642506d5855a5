"""Latents as sequences of 2x2 patches, the way FLUX and Qwen-Image pack them."""

from collections.abc import Sequence

from torch import Tensor


def pack_patches(latents: Tensor) -> Tensor:
    """Pack latents [n, c, h, w] into tokens [n, h/2 w/2, 4 c]; ``unpack_patches`` undoes it."""
    n, c, h, w = latents.shape
    patches = latents.reshape(n, c, h // 2, 2, w // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(n, h // 2 * (w // 2), 4 * c)


def unpack_patches(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Unpack tokens [n, h/2 w/2, 4 c] to latents [n, c, h, w].

    Args:
        tokens: The tokens, row by row.
        size: (h, w) of the latents.
    """
    h, w = size
    patches = tokens.unflatten(1, (h // 2, w // 2)).unflatten(-1, (-1, 2, 2))
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, h, w)
