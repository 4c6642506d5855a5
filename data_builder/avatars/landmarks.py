"""Where the face of a portrait is: its keypoints and its box, from the transforms and the parts of the drawing."""

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

from data_builder.avatars import vocabulary as words
from data_builder.avatars.identity import Identity, Scene
from data_builder.avatars.rendering import LEFT, SIDE, TOP, transforms

_FACE: Final = "translate(76 82)"
"""The drawing library's place of eyes, nose and mouth."""
_HEAD: Final = ((76, 60), (188, 60), (188, 186), (76, 186))
"""Corners of what is called the face: forehead to chin, without ears."""
_SCALE: Final = 4
"""Pixels of a drawing unit where the extent of a part is measured."""


@dataclass(frozen=True)
class Landmarks:
    """``keypoints`` [5, 2] (eyes, nose, corners of the mouth; the picture's left first) and ``box`` [4] (left, top,
    right, bottom), both in pixels."""

    keypoints: np.ndarray
    box: np.ndarray


def landmarks(person: Identity, scene: Scene, size: int = 128) -> Landmarks:
    """Of the portrait that ``draw`` draws at ``size`` pixels. Eyes behind glasses are where they would be seen."""
    maps = transforms(person, scene)
    pose = _matrix(maps.all)
    face = pose @ _matrix(_FACE)
    keypoints = np.concatenate(
        [
            _moved(face @ _matrix(maps.eyes), _eyes(words.EYES[scene.eyes])),
            _moved(face @ _matrix(maps.nose), _nose(words.NOSE[person.nose])),
            _moved(face @ _matrix(maps.mouth), _corners(words.EXPRESSION[scene.expression])),
        ]
    )
    head = _moved(pose, np.array(_HEAD, float))
    box = np.concatenate([head.min(0), head.max(0)])
    scale = size / SIDE
    return Landmarks((keypoints - (LEFT, TOP)) * scale, (box - (LEFT, TOP, LEFT, TOP)) * scale)


@cache
def _eyes(name: str) -> np.ndarray:
    """Middles of both eyes [2, 2] in the part's own units."""
    rows, columns = np.nonzero(_painted(pa.EyeType[name]))
    left = columns < 56 * _SCALE
    return np.array([_middle(rows[side], columns[side]) for side in (left, ~left)])


@cache
def _nose(name: str) -> np.ndarray:
    """The middle of the nose [1, 2]."""
    return np.array([_middle(*np.nonzero(_painted(pa.NoseType[name])))])


@cache
def _corners(name: str) -> np.ndarray:
    """The outermost points of the mouth [2, 2]."""
    rows, columns = np.nonzero(_painted(pa.MouthType[name]))
    ends = (columns <= columns.min() + _SCALE, columns >= columns.max() - _SCALE)
    return np.array([[columns[end].mean(), rows[end].mean()] for end in ends]) / _SCALE


def _middle(rows: np.ndarray, columns: np.ndarray) -> tuple[float, float]:
    """x and y halfway between the outermost painted pixels."""
    return float(columns.min() + columns.max()) / 2 / _SCALE, float(rows.min() + rows.max()) / 2 / _SCALE


def _painted(part: pa.EyeType | pa.NoseType | pa.MouthType) -> np.ndarray:
    """Where a part of the drawing library covers its place, alone: [height, width] at ``_SCALE`` pixels per unit."""
    text = (Path(pa.__file__).parent / part.__path__ / f"{part.value}.svg").read_text(encoding="utf-8")
    names = " ".join(re.findall(r'xmlns[^=]*="[^"]*"', text))
    whole = re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 120 60" {names}>', text, count=1)
    png = resvg_py.svg_to_bytes(svg_string=whole, width=120 * _SCALE, height=60 * _SCALE, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))[..., 3] > 20


def _moved(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points [n, 2] after an affine map."""
    moved: np.ndarray = points @ matrix[:2, :2].T + matrix[:2, 2]
    return moved


def _matrix(transform: str) -> np.ndarray:
    """The affine map [3, 3] of an SVG transform of ``translate``, ``scale`` and ``rotate`` about a point."""
    matrix = np.eye(3)
    for kind, inside in re.findall(r"(\w+)\(([^)]*)\)", transform):
        numbers = [float(value) for value in inside.split()]
        match kind, numbers:
            case "translate", [x, y]:
                step = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
            case "scale", [x, y]:
                step = np.diag([x, y, 1.0])
            case "rotate", [turn, x, y]:
                a, b = cos(radians(turn)), sin(radians(turn))
                step = np.array([[a, -b, x - a * x + b * y], [b, a, y - b * x - a * y], [0, 0, 1]])
            case _:
                raise ValueError(f"unknown transform {kind}({inside})")
        matrix = matrix @ step
    return matrix
