"""What a source knows of subjects and photos."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

SourceConfig = Mapping[str, str | int | None]
"""A source as JSON: its ``kind`` and its fields."""
CropBox = tuple[float, float, float, float]
"""Center x and y, side (pixels) and angle (degrees, counter-clockwise) of a square in a photo."""


class PhotoJson(TypedDict):
    """A photo in ``plan.json``."""

    ref: str
    sha256: str
    caption: str | None
    crop_box: Sequence[float] | None


@dataclass(frozen=True)
class Photo:
    """A photo of a subject.

    Attributes:
        ref: Name of the photo in its source.
        sha256: SHA-256 of the file, checked when it is read again; empty for rendered images.
        caption: Caption with ``{}`` for the subject; None: the templates of the recipe.
        crop_box: Square to learn; None: the largest in the middle.
    """

    ref: str
    sha256: str = ""
    caption: str | None = None
    crop_box: CropBox | None = None


def parse_photo(data: PhotoJson) -> Photo:
    """Parse a photo of ``plan.json``."""
    crop_box: CropBox | None = None
    if data["crop_box"]:
        x, y, side, angle = data["crop_box"]
        crop_box = (x, y, side, angle)
    return Photo(data["ref"], data["sha256"], data["caption"], crop_box)


@dataclass(frozen=True)
class SubjectEntry:
    """A subject of a source.

    Attributes:
        name: Name of the subject.
        photos: Name in the source and caption of each photo.
        split: ``train``, ``validation`` or ``test``, if the source defines it.
    """

    name: str
    photos: tuple[tuple[str, str | None], ...]
    split: str | None = None
