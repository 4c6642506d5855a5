"""Regions of an image, one for each LoRA: boxes in fractions of the image, or masks."""

from collections.abc import Sequence
from math import isfinite

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hyperlora.errors import InvalidArgumentError

Box = tuple[float, float, float, float]
"""``(left, top, right, bottom)`` in [0, 1], fractions of the image's width and height."""
Region = Box | Image.Image | Tensor
"""A box; or a mask of the image's aspect ratio, as an image (white is inside) or as a tensor
[height, width] in [0, 1]."""
MAX_ASPECT_ERROR = 0.02
"""Relative difference of a mask's aspect ratio from the image's that is still accepted."""


def compute_region_masks(regions: Sequence[Region], latent_size: tuple[int, int]) -> Tensor:
    """Compute how much of each latent position lies in each region.

    Args:
        regions: r boxes or masks.
        latent_size: Height and width of the latents in positions.

    Returns:
        Coverage [r, height, width] in [0, 1].

    Raises:
        InvalidArgumentError: A box exceeds the image, or a mask has another aspect ratio.
    """
    return torch.stack(
        [_compute_mask(region, number, latent_size) for number, region in enumerate(regions, 1)]
    )


def compute_region_windows(
    regions: Sequence[Region], latent_size: tuple[int, int]
) -> list[tuple[int, int, int, int]]:
    """Round boxes to windows of latent positions, each of one position or more.

    Args:
        regions: The boxes.
        latent_size: Height and width of the latents in positions.

    Returns:
        (top, left, height, width) of each box.

    Raises:
        InvalidArgumentError: A region is a mask, or a box exceeds the image.
    """
    latent_height, latent_width = latent_size
    windows = []
    for number, region in enumerate(regions, 1):
        if not isinstance(region, tuple):
            raise InvalidArgumentError(
                f"region {number} is a mask: windows need boxes (left, top, right, bottom)"
            )
        left, top, right, bottom = _validate_box(region, number)
        # A box thinner than half a position rounds to nothing: it gets one position, and one at the
        # right or lower edge must start inside the latents.
        first_row = min(round(top * latent_height), latent_height - 1)
        first_column = min(round(left * latent_width), latent_width - 1)
        height = max(1, round(bottom * latent_height) - first_row)
        width = max(1, round(right * latent_width) - first_column)
        windows.append((first_row, first_column, height, width))
    return windows


def _compute_mask(region: Region, number: int, latent_size: tuple[int, int]) -> Tensor:
    """Compute the coverage of one region [height, width]; ``number`` from 1 names it in errors."""
    height, width = latent_size
    if isinstance(region, tuple):
        left, top, right, bottom = _validate_box(region, number)
        row_coverage = _compute_coverage(top, bottom, height)  # [height]
        column_coverage = _compute_coverage(left, right, width)  # [width]
        # the area of a rectangle in a cell is the product of its shares of both sides
        return row_coverage[:, None] * column_coverage[None]  # [height, width]
    if isinstance(region, Image.Image):
        # 8-bit gray, one byte per pixel in row-major order; a bytearray, since bytes are read-only
        pixels = torch.frombuffer(bytearray(region.convert("L").tobytes()), dtype=torch.uint8)
        region = pixels.view(region.height, region.width).float() / 255  # [mask_h, mask_w]
    if region.ndim != 2 or not float(region.clamp(0, 1).sub(region).abs().max()) == 0:
        raise InvalidArgumentError(
            f"mask {number} must be [height, width] in [0, 1], got {list(region.shape)}"
        )
    mask_height, mask_width = region.shape
    # mask_height / mask_width against height / width, without division
    if abs(mask_height * width - mask_width * height) > MAX_ASPECT_ERROR * mask_width * height:
        raise InvalidArgumentError(
            f"mask {number} is {mask_width}x{mask_height}, the image has the aspect ratio "
            f"{width}:{height}: use the same aspect ratio"
        )
    # the mean of the pixels in each cell: the covered share of its area, as for boxes
    return F.interpolate(region[None, None].float(), (height, width), mode="area")[0, 0]


def _validate_box(box: Box, number: int) -> Box:
    """Return the box, or raise ``InvalidArgumentError`` unless it is a box inside the image."""
    if (
        len(box) != 4
        or not all(isfinite(v) for v in box)
        or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1)
    ):
        raise InvalidArgumentError(
            f"region {number} must be left < right and top < bottom in [0, 1], got {box}"
        )
    return box


def _compute_coverage(start: float, end: float, num_positions: int) -> Tensor:
    """Compute how much of each of ``num_positions`` equal cells of [0, 1] lies in [start, end]."""
    edges = torch.linspace(0, 1, num_positions + 1)  # [num_positions + 1]
    # min(right edge, end) - max(left edge, start), negative for cells outside of [start, end]
    overlap = edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)  # [num_positions]
    return (overlap * num_positions).clamp(0, 1)  # a cell is 1 / num_positions wide
