"""The part of a photo that is learned: a square, perhaps turned, and random ones inside it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import cos, radians, sin
from pathlib import Path

import numpy as np
from PIL import Image

from data_builder.sources.types import CropBox
from hyperlora.encoders.face_analysis import FaceAnalyzer
from hyperlora.errors import InvalidArgumentError

MAX_SIDE = 2048
"""Pixels of a side that a turned square is first drawn at."""


def compute_center_box(image: Image.Image) -> CropBox:
    """The largest square in the middle."""
    return image.width / 2, image.height / 2, float(min(image.size)), 0.0


def compute_full_box(image: Image.Image) -> CropBox:
    """All of it, on white where it is not square."""
    return image.width / 2, image.height / 2, float(max(image.size)), 0.0


def crop_image(image: Image.Image, crop_box: CropBox, resolution: int) -> Image.Image:
    """The square upright, ``resolution`` pixels a side; white where it leaves the picture."""
    x, y, side, angle = crop_box
    box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    if (
        angle == 0
        and box[0] >= 0
        and box[1] >= 0
        and box[2] <= image.width
        and box[3] <= image.height
    ):
        return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box)
    warp_size = int(min(MAX_SIDE, max(resolution, side)))
    pixel_size, angle_rad = side / warp_size, radians(angle)
    a, b = pixel_size * cos(angle_rad), pixel_size * sin(angle_rad)
    affine = (a, b, x - (a + b) * warp_size / 2, -b, a, y - (a - b) * warp_size / 2)
    warped = image.transform(
        (warp_size, warp_size),
        Image.Transform.AFFINE,
        affine,
        Image.Resampling.BICUBIC,
        fillcolor="white",
    )
    return warped.resize((resolution, resolution), Image.Resampling.BICUBIC)


def jitter_box(crop_box: CropBox, rng: np.random.Generator, min_scale: float = 0.85) -> CropBox:
    """A random smaller square inside, of at least ``min_scale`` of its side."""
    x, y, side, angle = crop_box
    new_side = side * rng.uniform(min_scale, 1)
    dx, dy = (rng.uniform(-1, 1) * (side - new_side) / 2 for _ in range(2))
    angle_rad = radians(angle)
    return (
        x + dx * cos(angle_rad) + dy * sin(angle_rad),
        y - dx * sin(angle_rad) + dy * cos(angle_rad),
        new_side,
        angle,
    )


@dataclass(frozen=True)
class FaceCropper:
    """The upright square around a face, by size from the largest (``face_index`` = 0)."""

    analyzer: FaceAnalyzer
    face_index: int = 0
    margin: float = 1.8

    @property
    def metadata(self) -> Mapping[str, str]:
        return {"face_pack": Path(self.analyzer.pack).name, "face_licence": self.analyzer.license}

    def __call__(self, image: Image.Image, warnings: list[str]) -> CropBox:
        """Raises ``InvalidImageError`` for a photo without that face."""
        face = self.analyzer.get_face(image, self.face_index)
        if self.face_index == 0 and (num_others := len(self.analyzer.detect_faces(image)) - 1):
            warnings.append(f"{num_others + 1} faces, the largest was taken (another by --face N)")
        return face.compute_aligned_crop_box(self.margin)


def make_face_cropper(
    pack: str | Path | None, face_index: int = 0, margin: float = 1.8
) -> FaceCropper:
    """Raises ``InvalidArgumentError`` if no pack is named, and what ``FaceAnalyzer`` raises."""
    if pack is None:
        raise InvalidArgumentError(
            "--crop face needs --face-pack: a folder of ONNX models (detector and, perhaps, recogniser)"
        )
    return FaceCropper(FaceAnalyzer(pack), face_index, margin)


Cropper = Callable[[Image.Image, list[str]], CropBox]
"""The square of a photo that is learned; may add remarks, may raise ``InvalidImageError`` for a photo without one."""


def make_cropper(
    kind: str, face_pack: str | Path | None = None, face_index: int = 0, margin: float = 1.8
) -> Cropper | None:
    """``center``, ``none`` (all of it, on white) or ``face`` by name. Raises ``InvalidArgumentError`` for another."""
    match kind:
        case "center":
            return lambda image, remarks: compute_center_box(image)
        case "none":
            return lambda image, remarks: compute_full_box(image)
        case "face":
            return make_face_cropper(face_pack, face_index, margin)
    raise InvalidArgumentError(f"unknown crop {kind!r}; known: face, center, none")
