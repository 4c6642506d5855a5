"""Regions of a picture, each for one LoRA: boxes in fractions of the picture, or masks."""

from collections.abc import Sequence
from math import isfinite

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hyperlora.errors import InvalidArgumentError

Box = tuple[float, float, float, float]
Region = Box | Image.Image | Tensor
"""``(left, top, right, bottom)`` in [0, 1] of the picture's width and height; or a mask as a picture (white is inside)
or a tensor [height, width] in [0, 1], of the picture's shape."""


def compute_region_masks(regions: Sequence[Region], latent_size: tuple[int, int]) -> Tensor:
    """How much of each latent position lies in each region, [regions, height, width] in [0, 1].

    Raises ``InvalidArgumentError`` for a box outside the picture or a mask of another shape than the picture.
    """
    return torch.stack(
        [_compute_mask(region, number, latent_size) for number, region in enumerate(regions, 1)]
    )


def compute_region_windows(
    regions: Sequence[Region], latent_size: tuple[int, int]
) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of boxes in latent positions. Raises ``InvalidArgumentError`` for a mask."""
    height, width = latent_size
    boxes = []
    for number, region in enumerate(regions, 1):
        if not isinstance(region, tuple):
            raise InvalidArgumentError(
                f"region {number} is a mask: windows are made of boxes (left, top, right, bottom)"
            )
        left, top, right, bottom = _validate_box(region, number)
        x0, y0 = min(round(left * width), width - 1), min(round(top * height), height - 1)
        boxes.append(
            (y0, x0, max(1, round(bottom * height) - y0), max(1, round(right * width) - x0))
        )
    return boxes


def _compute_mask(region: Region, number: int, latent_size: tuple[int, int]) -> Tensor:
    height, width = latent_size
    if isinstance(region, tuple):
        left, top, right, bottom = _validate_box(region, number)
        rows, columns = (
            _compute_coverage(top, bottom, height),
            _compute_coverage(left, right, width),
        )
        return rows[:, None] * columns[None]
    if isinstance(region, Image.Image):
        pixels = torch.frombuffer(bytearray(region.convert("L").tobytes()), dtype=torch.uint8)
        region = pixels.view(region.height, region.width).float() / 255
    if region.ndim != 2 or not float(region.clamp(0, 1).sub(region).abs().max()) == 0:
        raise InvalidArgumentError(
            f"mask {number} must be [height, width] in [0, 1], got {list(region.shape)}"
        )
    if abs(region.shape[0] * width - region.shape[1] * height) > 0.02 * region.shape[1] * height:
        mask_size = f"{region.shape[1]}x{region.shape[0]}"
        raise InvalidArgumentError(
            f"mask {number} is {mask_size}, the picture has the shape {width}:{height}: use the same shape"
        )
    return F.interpolate(region[None, None].float(), (height, width), mode="area")[0, 0]


def _validate_box(box: Box, number: int) -> Box:
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
    """How much of each of ``num_positions`` cells of [0, 1] lies between ``start`` and ``end``."""
    edges = torch.linspace(0, 1, num_positions + 1)
    return ((edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)) * num_positions).clamp(0, 1)
