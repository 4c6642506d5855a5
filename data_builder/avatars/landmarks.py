"""Keypoints and face box of a portrait, from the transforms and the parts of the drawing."""

import io
import re
from dataclasses import dataclass
from functools import cache
from math import cos, radians, sin
from pathlib import Path
from typing import Final

import numpy as np
import python_avatars as pa
import resvg_py
from PIL import Image

from data_builder.avatars import vocabulary
from data_builder.avatars.identity import AvatarIdentity, Scene
from data_builder.avatars.rendering import CROP_LEFT, CROP_SIZE, CROP_TOP, compute_transforms

_FACE_TRANSFORM: Final = "translate(76 82)"
"""Position of eyes, nose and mouth in the drawing library."""
_FACE_CORNERS: Final = ((76, 60), (188, 60), (188, 186), (76, 186))
"""Corners of the face: forehead to chin, without ears, in drawing units."""
_PIXELS_PER_UNIT: Final = 4
"""Pixels of a drawing unit where the extent of a part is measured."""


@dataclass(frozen=True)
class Landmarks:
    """Face geometry of a portrait in pixels.

    Attributes:
        keypoints: Centers of the eyes, nose, corners of the mouth [5, 2] as (x, y); the left of the
            image first.
        box: Left, top, right, bottom of the face [4].
    """

    keypoints: np.ndarray
    box: np.ndarray


def compute_landmarks(person: AvatarIdentity, scene: Scene, size: int = 128) -> Landmarks:
    """Compute the landmarks of the portrait that ``render_portrait`` draws.

    Args:
        person: Identity of the portrait.
        scene: Scene of the portrait. Eyes behind glasses get the position they have without them.
        size: Side of the portrait in pixels.

    Returns:
        Keypoints and box in pixels.
    """
    part_transforms = compute_transforms(person, scene)
    pose_matrix = _parse_transform(part_transforms.pose)
    face_matrix = pose_matrix @ _parse_transform(_FACE_TRANSFORM)
    keypoints = np.concatenate(
        [
            _apply_affine(
                face_matrix @ _parse_transform(part_transforms.eyes),
                _find_eye_centers(vocabulary.EYES[scene.eyes]),
            ),
            _apply_affine(
                face_matrix @ _parse_transform(part_transforms.nose),
                _find_nose_center(vocabulary.NOSE[person.nose]),
            ),
            _apply_affine(
                face_matrix @ _parse_transform(part_transforms.mouth),
                _find_mouth_corners(vocabulary.EXPRESSION[scene.expression]),
            ),
        ]
    )
    face_corners = _apply_affine(pose_matrix, np.array(_FACE_CORNERS, float))
    box = np.concatenate([face_corners.min(0), face_corners.max(0)])
    scale = size / CROP_SIZE
    return Landmarks(
        (keypoints - (CROP_LEFT, CROP_TOP)) * scale,
        (box - (CROP_LEFT, CROP_TOP, CROP_LEFT, CROP_TOP)) * scale,
    )


@cache
def _find_eye_centers(name: str) -> np.ndarray:
    """Centers of both eyes [2, 2] in the units of the part."""
    rows, columns = np.nonzero(_render_part_mask(pa.EyeType[name]))
    left = columns < 56 * _PIXELS_PER_UNIT
    return np.array([_compute_center(rows[side], columns[side]) for side in (left, ~left)])


@cache
def _find_nose_center(name: str) -> np.ndarray:
    """Center of the nose [1, 2] in the units of the part."""
    return np.array([_compute_center(*np.nonzero(_render_part_mask(pa.NoseType[name])))])


@cache
def _find_mouth_corners(name: str) -> np.ndarray:
    """Outermost points of the mouth [2, 2] in the units of the part."""
    rows, columns = np.nonzero(_render_part_mask(pa.MouthType[name]))
    end_masks = (
        columns <= columns.min() + _PIXELS_PER_UNIT,
        columns >= columns.max() - _PIXELS_PER_UNIT,
    )
    return (
        np.array([[columns[end].mean(), rows[end].mean()] for end in end_masks]) / _PIXELS_PER_UNIT
    )


def _compute_center(rows: np.ndarray, columns: np.ndarray) -> tuple[float, float]:
    """Compute x and y halfway between the outermost painted pixels."""
    return float(columns.min() + columns.max()) / 2 / _PIXELS_PER_UNIT, float(
        rows.min() + rows.max()
    ) / 2 / _PIXELS_PER_UNIT


def _render_part_mask(part: pa.EyeType | pa.NoseType | pa.MouthType) -> np.ndarray:
    """Render the pixels [height, width] that a part covers, at ``_PIXELS_PER_UNIT`` pixels per
    unit.
    """
    text = (Path(pa.__file__).parent / part.__path__ / f"{part.value}.svg").read_text(
        encoding="utf-8"
    )
    namespaces = " ".join(re.findall(r'xmlns[^=]*="[^"]*"', text))
    wrapped_svg = re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 120 60" {namespaces}>', text, count=1)
    png = resvg_py.svg_to_bytes(
        svg_string=wrapped_svg,
        width=120 * _PIXELS_PER_UNIT,
        height=60 * _PIXELS_PER_UNIT,
        skip_system_fonts=True,
    )
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))[..., 3] > 20


def _apply_affine(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply an affine map [3, 3] to points [n, 2]."""
    transformed_points: np.ndarray = points @ matrix[:2, :2].T + matrix[:2, 2]
    return transformed_points


def _parse_transform(transform: str) -> np.ndarray:
    """Parse an SVG transform of ``translate``, ``scale`` and ``rotate`` about a point into a matrix
    [3, 3].
    """
    matrix = np.eye(3)
    for kind, arguments in re.findall(r"(\w+)\(([^)]*)\)", transform):
        numbers = [float(value) for value in arguments.split()]
        match kind, numbers:
            case "translate", [x, y]:
                factor = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
            case "scale", [x, y]:
                factor = np.diag([x, y, 1.0])
            case "rotate", [turn, x, y]:
                a, b = cos(radians(turn)), sin(radians(turn))
                factor = np.array(
                    [[a, -b, x - a * x + b * y], [b, a, y - b * x - a * y], [0, 0, 1]]
                )
            case _:
                raise ValueError(f"unknown transform {kind}({arguments})")
        matrix = matrix @ factor
    return matrix
