"""The part of a photo that is learned: a square, perhaps turned, and random ones inside it."""

from math import cos, radians, sin

import numpy as np
from PIL import Image

from data_builder.plan import Square

MOST = 2048
"""Pixels of a side that a turned square is first drawn at."""


def centre(image: Image.Image) -> Square:
    """The largest square in the middle."""
    return image.width / 2, image.height / 2, float(min(image.size)), 0.0


def whole(image: Image.Image) -> Square:
    """All of it, on white where it is not square."""
    return image.width / 2, image.height / 2, float(max(image.size)), 0.0


def cut(image: Image.Image, square: Square, size: int) -> Image.Image:
    """The square upright, ``size`` pixels a side; white where it leaves the picture."""
    x, y, side, angle = square
    box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    if angle == 0 and box[0] >= 0 and box[1] >= 0 and box[2] <= image.width and box[3] <= image.height:
        return image.resize((size, size), Image.Resampling.BICUBIC, box)
    n = int(min(MOST, max(size, side)))
    step, turn = side / n, radians(angle)
    a, b = step * cos(turn), step * sin(turn)
    affine = (a, b, x - (a + b) * n / 2, -b, a, y - (a - b) * n / 2)
    drawn = image.transform((n, n), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC, fillcolor="white")
    return drawn.resize((size, size), Image.Resampling.BICUBIC)


def varied(square: Square, rng: np.random.Generator, least: float = 0.85) -> Square:
    """A random smaller square inside, of at least ``least`` of its side."""
    x, y, side, angle = square
    smaller = side * rng.uniform(least, 1)
    right, down = (rng.uniform(-1, 1) * (side - smaller) / 2 for _ in range(2))
    turn = radians(angle)
    return x + right * cos(turn) + down * sin(turn), y - right * sin(turn) + down * cos(turn), smaller, angle
