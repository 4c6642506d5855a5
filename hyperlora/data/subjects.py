"""Subjects in a folder of photos."""

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from hyperlora.data.images import IMAGE_SUFFIXES, is_within, list_entries, list_image_files
from hyperlora.errors import InvalidImageError

MAX_CAPTION_BYTES: Final = 64_000
"""The longest caption file that is read."""


@dataclass(frozen=True)
class Subject:
    """A person or thing on some photos.

    Attributes:
        name: The name of the sub-folder, or of the photo without its suffix.
        photos: The image files.
        captions: The caption of each photo, or None.
    """

    name: str
    photos: tuple[Path, ...]
    captions: tuple[str | None, ...]


def list_subjects(
    folder: str | os.PathLike[str], skip_reasons: list[str] | None = None
) -> list[Subject]:
    """List the subjects of a folder: each sub-folder of photos, and each image directly in it.

    A caption is the first line of the ``.txt`` beside the photo (``me.jpg``, ``me.txt``), as in
    kohya's scripts. Hidden files and links that lead out of the folder are skipped.

    Args:
        folder: The folder.
        skip_reasons: A list that receives why subjects are skipped; None raises instead.

    Returns:
        The subjects, sorted by name.

    Raises:
        InvalidImageError: There is no subject; or, without ``skip_reasons``, a sub-folder holds no
            image, a caption cannot be read, or two subjects have the same name.
    """
    root = Path(folder)
    paths = [path for path in list_entries(root) if is_within(path, root)]
    subjects = []
    for path in paths:
        try:
            if path.is_dir():
                subjects.append(
                    _make_subject(path.name, list_image_files(path, root_dir=root), root)
                )
            elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                subjects.append(_make_subject(path.stem, [path], root))
        except InvalidImageError as error:
            if skip_reasons is None:
                raise
            skip_reasons.append(str(error))
    if not subjects:
        raise InvalidImageError(
            f"{str(root)!r} holds no subject: put PNG, JPEG or WEBP images there, "
            "or one sub-folder of them per subject"
        )
    subjects.sort(key=lambda subject: subject.name)
    duplicates = [first for first, second in pairwise(subjects) if first.name == second.name]
    for subject in duplicates:
        reason = (
            f"{str(root)!r} holds two subjects called {subject.name!r}, one expected: "
            "rename one of them"
        )
        if skip_reasons is None:
            raise InvalidImageError(reason)
        skip_reasons.append(reason)
        subjects.remove(subject)
    return subjects


def _make_subject(name: str, photos: list[Path], root: Path) -> Subject:
    return Subject(name, tuple(photos), tuple(_read_caption(photo, root) for photo in photos))


def _read_caption(photo: Path, root: Path) -> str | None:
    """Read the caption beside a photo; None if there is none or it is empty."""
    path = photo.with_suffix(".txt")
    if not path.is_file() or not is_within(path, root):
        return None
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CAPTION_BYTES + 1).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidImageError(
            f"the caption {str(path)!r} cannot be read as UTF-8 text: save it so, or remove it"
        ) from error
    if len(text) > MAX_CAPTION_BYTES:
        raise InvalidImageError(
            f"the caption {str(path)!r} is longer than {MAX_CAPTION_BYTES} bytes: shorten it"
        )
    lines = text.splitlines()
    return (lines[0].strip() or None) if lines else None
