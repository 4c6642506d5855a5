from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CropBox = tuple[float, float, float, float]
"""Centre x, y, side (pixels) and angle (degrees, counter-clockwise) of the part of a photo that is learned."""


@dataclass(frozen=True)
class Photo:
    """``ref`` is what the source calls it; ``sha256`` of the file, checked when it is read again (drawn pictures have
    none); no ``sample_caption`` means the recipe's templates, no ``crop_box`` the largest in the middle."""

    ref: str
    sha256: str = ""
    caption: str | None = None
    crop_box: CropBox | None = None


def _parse_photo(data: Mapping[str, Any]) -> Photo:
    return Photo(
        data["ref"],
        data["sha256"],
        data["caption"],
        tuple(data["square"]) if data["square"] else None,
    )


@dataclass(frozen=True)
class SubjectEntry:
    """One subject: what its photos are called and their captions; ``split`` where the source knows it."""

    name: str
    photos: tuple[tuple[str, str | None], ...]
    split: str | None = None
