"""Crops of photos: a square, possibly rotated, and random squares inside it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import cos, radians, sin
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from PIL import Image

from data_builder.sources.types import CropBox
from hyperlora.encoders.face_analysis import FaceAnalyzer
from hyperlora.errors import InvalidArgumentError

MAX_SIDE: Final = 2048
"""Largest side in pixels at which a rotated square is sampled before it is resized."""


def compute_center_box(image: Image.Image) -> CropBox:
    """Compute the largest square in the middle of the image."""
    return image.width / 2, image.height / 2, float(min(image.size)), 0.0


def compute_full_box(image: Image.Image) -> CropBox:
    """Compute the smallest square around the whole image, which leaves white margins."""
    return image.width / 2, image.height / 2, float(max(image.size)), 0.0


def crop_image(image: Image.Image, crop_box: CropBox, resolution: int) -> Image.Image:
    """Crop a square and turn it upright.

    Args:
        image: Image to crop.
        crop_box: Center, side and angle of the square; white where it leaves the image.
        resolution: Side of the result in pixels.

    Returns:
        Image of ``resolution`` x ``resolution`` pixels (bicubic).
    """
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
    """Sample a smaller square inside a square, with the same angle.

    Args:
        crop_box: Square to stay inside.
        rng: Random generator.
        min_scale: Least side relative to that of ``crop_box``.

    Returns:
        The smaller square.
    """
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


class Cropper(Protocol):
    """Chooses the square of a photo to learn."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Facts about the cropper that the plan records."""

    def __call__(self, image: Image.Image, warnings: list[str]) -> CropBox:
        """Choose a square.

        Args:
            image: Photo of a subject.
            warnings: List to append sentences to, for the user.

        Returns:
            The square.

        Raises:
            InvalidImageError: If the photo has no suitable square.
        """


@dataclass(frozen=True)
class BoxCropper:
    """A cropper that depends on the size of the photo alone.

    Attributes:
        compute_box: Function from a photo to its square.
    """

    compute_box: Callable[[Image.Image], CropBox]

    @property
    def metadata(self) -> Mapping[str, str]:
        """Nothing."""
        return {}

    def __call__(self, image: Image.Image, warnings: list[str]) -> CropBox:
        """Compute the square; ``warnings`` stays as it is."""
        return self.compute_box(image)


CENTER_CROPPER: Final = BoxCropper(compute_center_box)
FULL_CROPPER: Final = BoxCropper(compute_full_box)


@dataclass(frozen=True)
class FaceCropper:
    """A cropper that takes the upright square around a face.

    Attributes:
        analyzer: Face detector.
        face_index: Which face, by size from the largest (0).
        margin: Side of the square relative to the face.
    """

    analyzer: FaceAnalyzer
    face_index: int = 0
    margin: float = 1.8

    @property
    def metadata(self) -> Mapping[str, str]:
        """Name and license of the face pack."""
        return {"face_pack": Path(self.analyzer.pack).name, "face_license": self.analyzer.license}

    def __call__(self, image: Image.Image, warnings: list[str]) -> CropBox:
        """Find the square around the face.

        Args:
            image: Photo of a subject.
            warnings: Gets a sentence if the photo shows several faces.

        Returns:
            The square.

        Raises:
            InvalidImageError: If the photo lacks that face.
        """
        face = self.analyzer.get_face(image, self.face_index)
        if self.face_index == 0 and (num_faces := len(self.analyzer.detect_faces(image))) > 1:
            warnings.append(
                f"{num_faces} faces, the largest was taken (another with --face-index N)"
            )
        return face.compute_aligned_crop_box(self.margin)


def make_cropper(
    kind: str, face_pack: str | Path | None = None, face_index: int = 0, margin: float = 1.8
) -> Cropper:
    """Make a cropper by name.

    Args:
        kind: ``center`` (largest square in the middle), ``none`` (all of it, on white) or ``face``.
        face_pack: Folder or name of an insightface pack, for ``face``.
        face_index: Which face, by size from the largest (0).
        margin: Side of the square relative to the face.

    Returns:
        The cropper.

    Raises:
        InvalidArgumentError: For an unknown kind, or ``face`` without a pack.
    """
    match kind:
        case "center":
            return CENTER_CROPPER
        case "none":
            return FULL_CROPPER
        case "face":
            if face_pack is None:
                raise InvalidArgumentError(
                    "--crop face needs --face-pack: a folder of ONNX models (detector and, "
                    "perhaps, recognizer)"
                )
            return FaceCropper(FaceAnalyzer(face_pack), face_index, margin)
    raise InvalidArgumentError(f"unknown crop {kind!r}; known: face, center, none")
