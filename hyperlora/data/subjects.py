"""Subjects in a folder of photos."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from hyperlora.data.images import IMAGE_SUFFIXES, is_within, list_entries, list_image_files
from hyperlora.data.subject_layouts import (
    PhotoEntry,
    SubjectLayout,
    list_strangers,
    read_identity_file,
    read_metadata,
    recognize_layout,
)
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
    folder: str | os.PathLike[str],
    skip_reasons: list[str] | None = None,
    layout: SubjectLayout | None = None,
) -> list[Subject]:
    """List the subjects of a folder: each sub-folder of photos, and each image directly in it.

    Collections of photos are recognized by their own layouts (``hyperlora.data.subject_layouts``).
    A caption is the first line of the ``.txt`` beside the photo (``me.jpg``, ``me.txt``), as in
    kohya's scripts. Hidden files and links that lead out of the folder are skipped.

    Args:
        folder: The folder.
        skip_reasons: A list that receives why subjects are skipped; None raises instead.
        layout: The layout; None to recognize it.

    Returns:
        The subjects, sorted by name.

    Raises:
        InvalidImageError: There is no subject; or, without ``skip_reasons``, a sub-folder holds no
            image, a caption cannot be read, or two subjects have the same name.
    """
    root = Path(folder)
    layout = layout or recognize_layout(root)
    reasons: list[str] = []
    if layout == "folders":
        subjects = _list_folders(root, reasons)
    else:
        subjects = _make_subjects(_read_entries(root, layout, reasons), root, reasons)
    if not subjects:
        raise InvalidImageError(_format_no_subject(root, reasons))
    if reasons and skip_reasons is None:
        raise InvalidImageError(reasons[0])
    if skip_reasons is not None:
        skip_reasons += reasons
    return subjects


def _list_folders(root: Path, reasons: list[str]) -> list[Subject]:
    """List a subject for each sub-folder, and for each image directly in the folder."""
    paths = [path for path in list_entries(root) if is_within(path, root)]
    subjects = []
    for path in paths:
        try:
            if path.is_dir():
                entries = [(photo, None) for photo in list_image_files(path, root_dir=root)]
                subjects.append(_make_subject(path.name, entries, root))
            elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                subjects.append(_make_subject(path.stem, [(path, None)], root))
        except InvalidImageError as error:
            reasons.append(str(error))
    subjects.sort(key=lambda subject: subject.name)
    for subject in [first for first, second in pairwise(subjects) if first.name == second.name]:
        reasons.append(
            f"{str(root)!r} holds two subjects called {subject.name!r}, one expected: "
            "rename one of them"
        )
        subjects.remove(subject)
    return subjects


def _read_entries(
    root: Path, layout: SubjectLayout, reasons: list[str]
) -> Mapping[str, list[PhotoEntry]]:
    """Read photos and captions by subject, where a list or numbers say who is shown."""
    if layout == "strangers":
        return list_strangers(root)
    if layout == "identity_file":
        return read_identity_file(root, reasons)
    return read_metadata(root, reasons)


def _make_subjects(
    entries: Mapping[str, list[PhotoEntry]], root: Path, reasons: list[str]
) -> list[Subject]:
    subjects = []
    for name, photos in sorted(entries.items()):
        try:
            subjects.append(_make_subject(name, photos, root))
        except InvalidImageError as error:
            reasons.append(str(error))
    return subjects


def _format_no_subject(root: Path, reasons: Sequence[str]) -> str:
    """Say why a folder has no subject; name a sub-folder that has some."""
    for path in list_entries(root):
        images = (p for p in path.glob("*/*.*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if path.is_dir() and next(images, None) is not None:
            return (
                f"{str(root)!r} holds folders of folders, a sub-folder of images per subject was "
                f"expected: name one level deeper, as {str(path)!r}"
            )
    if reasons:
        return reasons[0]
    return (
        f"{str(root)!r} holds no subject: put PNG, JPEG or WEBP images there, "
        "or one sub-folder of them per subject"
    )


def _make_subject(name: str, entries: Sequence[PhotoEntry], root: Path) -> Subject:
    """Make a subject; a caption that the layout does not state is read beside the photo."""
    captions = (
        caption if caption is not None else _read_caption(photo, root) for photo, caption in entries
    )
    return Subject(name, tuple(photo for photo, _ in entries), tuple(captions))


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
