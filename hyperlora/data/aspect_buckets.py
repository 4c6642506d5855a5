"""Aspect-ratio buckets: sizes of about the same area, by the rule of kohya's sd-scripts.

Sides are multiples of 64, and the area is at most that of the square. An image goes to the bucket
of the nearest aspect ratio, is resized to cover it, and loses the rest.
"""

from math import isqrt
from typing import Final

ImageSize = tuple[int, int]
"""Width and height in pixels."""
SIDE_MULTIPLE: Final = 64
_MIN_SIDE_SCALE: Final = 0.5
_MAX_SIDE_SCALE: Final = 2.0


def make_buckets(resolution: int, side_multiple: int = SIDE_MULTIPLE) -> list[ImageSize]:
    """Make the sizes of all buckets.

    Args:
        resolution: Side of the square whose area bounds that of every bucket.
        side_multiple: Sides are multiples of this. Below 64 only for small images.

    Returns:
        Sizes sorted by width, from half to twice the resolution on a side.
    """
    max_area = resolution**2
    square_side = isqrt(max_area) // side_multiple * side_multiple
    min_side = max(
        side_multiple, int(resolution * _MIN_SIDE_SCALE) // side_multiple * side_multiple
    )
    max_side = int(resolution * _MAX_SIDE_SCALE) // side_multiple * side_multiple
    buckets = {(square_side, square_side)}
    for width in range(min_side, max_side + 1, side_multiple):
        height = min(max_side, max_area // width // side_multiple * side_multiple)
        if height >= min_side:
            buckets |= {(width, height), (height, width)}
    return sorted(buckets)


def choose_bucket(size: ImageSize, buckets: list[ImageSize]) -> ImageSize:
    """Choose the bucket whose aspect ratio is nearest to an image's.

    Args:
        size: Width and height of the image.
        buckets: Sizes of the buckets.

    Returns:
        The size of the bucket; of equally near ones that with the largest area.
    """
    ratio = size[0] / size[1]
    return min(buckets, key=lambda b: (abs(b[0] / b[1] - ratio), -b[0] * b[1]))
