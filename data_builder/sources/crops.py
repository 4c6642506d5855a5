"""The part of a photo that is learned: a square, perhaps turned, and random ones inside it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import cos, radians, sin
from pathlib import Path

import numpy as np
from PIL import Image

from data_builder.sources.types import Square
from hyperlora.encoders.face_analysis import FaceFinder
from hyperlora.errors import BadRequest

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


@dataclass(frozen=True)
class FaceCrop:
    """The upright square around a face, by size from the largest (``which`` = 0)."""

    finder: FaceFinder
    which: int = 0
    margin: float = 1.8

    @property
    def notes(self) -> Mapping[str, str]:
        return {"face_pack": Path(self.finder.pack).name, "face_licence": self.finder.licence}

    def __call__(self, image: Image.Image, remarks: list[str]) -> Square:
        """Raises ``BadImage`` for a photo without that face."""
        face = self.finder.face(image, self.which)
        if self.which == 0 and (others := len(self.finder.faces(image)) - 1):
            remarks.append(f"{others + 1} faces, the largest was taken (another by --face N)")
        return face.square(self.margin)


def face_crop(pack: str | Path | None, which: int = 0, margin: float = 1.8) -> FaceCrop:
    """Raises ``BadRequest`` if no pack is named, and what ``FaceFinder`` raises."""
    if pack is None:
        raise BadRequest("--crop face needs --face-pack: a folder of ONNX models (detector and, perhaps, recogniser)")
    return FaceCrop(FaceFinder(pack), which, margin)


Crop = Callable[[Image.Image, list[str]], Square]
"""The square of a photo that is learned; may add remarks, may raise ``BadImage`` for a photo without one."""


def crop_of(kind: str, face_pack: str | Path | None = None, which: int = 0, margin: float = 1.8) -> Crop | None:
    """``center``, ``none`` (all of it, on white) or ``face`` by name. Raises ``BadRequest`` for another."""
    match kind:
        case "center":
            return lambda image, remarks: centre(image)
        case "none":
            return lambda image, remarks: whole(image)
        case "face":
            return face_crop(face_pack, which, margin)
    raise BadRequest(f"unknown crop {kind!r}; known: face, center, none")
