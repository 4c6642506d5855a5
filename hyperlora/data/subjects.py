"""Subjects in a folder of photos."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from hyperlora.data.captions import CaptionReader
from hyperlora.data.image_formats import (
    PHOTO_SUFFIXES,
    explain_format,
    format_kind,
    get_format_of_suffix,
)
from hyperlora.data.images import is_within, list_entries
from hyperlora.data.subject_layouts import (
    PhotoEntry,
    SubjectLayout,
    list_photos_without_row,
    list_strangers,
    read_identity_file,
    read_metadata,
    read_people,
    recognize_layout,
    walk_photos,
)
from hyperlora.errors import InvalidImageError

_REPEATS_NAME: Final = re.compile(r"(0|[1-9]\d{0,4})_(.*\S.*)")
"""kohya's folders: how often photos are repeated, and what they show (``10_sks person``)."""
_NUM_NAMES_SHOWN: Final = 3
_NESTED_REASON: Final = (
    "a photo in a folder within the folder of a subject, where none is read: move it up"
)


@dataclass(frozen=True)
class Subject:
    """A person or thing on some photos.

    Attributes:
        name: The name of the sub-folder, or of the photo without its suffix.
        photos: The image files.
        captions: The caption of each photo, or None.
        repeats: How often a training sees the subject in an epoch: kohya's ``10_name``.
    """

    name: str
    photos: tuple[Path, ...]
    captions: tuple[str | None, ...]
    repeats: int = 1


@dataclass(frozen=True)
class SkippedPhoto:
    """A photo that is not used.

    Attributes:
        path: The file.
        reason: What it is, and what to do: the end of a sentence that begins with "is".
    """

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{str(self.path)!r} is {self.reason}"


def list_subjects(
    folder: str | os.PathLike[str],
    skip_reasons: list[str] | None = None,
    layout: SubjectLayout | None = None,
    skipped_photos: list[SkippedPhoto] | None = None,
) -> list[Subject]:
    """List the subjects of a folder: each sub-folder of photos, and each image directly in it.

    Collections of photos are recognized by their own layouts (``hyperlora.data.subject_layouts``).
    ``hyperlora.data.captions`` says where captions come from. Hidden files are ignored. Links that
    lead out of the folder, photos in formats without a decoder, and photos in a folder within a
    sub-folder are skipped.

    Args:
        folder: The folder.
        skip_reasons: A list that receives why subjects and photos are skipped; None raises where a
            whole subject would be.
        layout: The layout; None to recognize it.
        skipped_photos: A list that receives each photo that is skipped.

    Returns:
        The subjects, sorted by name.

    Raises:
        InvalidImageError: There is no subject; or, without ``skip_reasons``, a sub-folder holds no
            image, a caption cannot be read, or two subjects have the same name.
    """
    root = Path(folder)
    layout = layout or recognize_layout(root)
    reasons: list[str] = []
    skipped: list[SkippedPhoto] = []
    if layout == "folders":
        subjects = _list_folders(root, reasons, skipped)
    else:
        subjects = _make_subjects(_read_entries(root, layout, reasons), root, reasons, skipped)
        if layout == "metadata":
            reason = "a photo without a row in the metadata: add one"
            skipped += [SkippedPhoto(path, reason) for path in list_photos_without_row(root)]
    if not subjects:
        raise InvalidImageError(_format_no_subject(root, reasons, skipped))
    if reasons and skip_reasons is None:
        raise InvalidImageError(reasons[0])
    if skip_reasons is not None:
        skip_reasons += [*reasons, *summarize_skipped_photos(skipped, root)]
    if skipped_photos is not None:
        skipped_photos += skipped
    return subjects


def summarize_skipped_photos(photos: Sequence[SkippedPhoto], root: Path) -> list[str]:
    """Count skipped photos by reason.

    Args:
        photos: The photos.
        root: The folder to which names are relative.

    Returns:
        A sentence for each reason, with the first names.
    """
    names: dict[str, list[str]] = {}
    for photo in photos:
        names.setdefault(photo.reason, []).append(str(photo.path.relative_to(root)))
    return [
        f"{len(paths)} photos skipped ({', '.join(paths[:_NUM_NAMES_SHOWN])}"
        f"{', ...' if len(paths) > _NUM_NAMES_SHOWN else ''}), each is {reason}"
        for reason, paths in names.items()
    ]


def _list_folders(root: Path, reasons: list[str], skipped: list[SkippedPhoto]) -> list[Subject]:
    """List a subject for each sub-folder, and for each image directly in the folder."""
    reader = CaptionReader(root)
    subjects: list[Subject] = []
    entries = list_entries(root)
    folders = [path for path in entries if path.is_dir() and is_within(path, root)]
    photos_by_stem: dict[str, Path] = {}
    for photo in _select_photos([path for path in entries if path not in folders], root, skipped):
        if (first := photos_by_stem.setdefault(photo.stem, photo)) is not photo:
            reason = f"a photo with the name of {first.name!r}: rename it if it shows someone else"
            skipped.append(SkippedPhoto(photo, reason))
            continue
        _add_subject(subjects, photo.stem, [(photo, None)], reader, reasons)
    repeats = _parse_repeats([path.name for path in folders])
    for path in folders:
        name, num_repeats = repeats.get(path.name, (path.name, 1))
        skipped_here: list[SkippedPhoto] = []
        try:
            photos = _select_photos(list_entries(path), root, skipped_here)
        except InvalidImageError as error:
            reasons.append(str(error))
            continue
        if not num_repeats:  # kohya leaves such a folder out, too
            skipped.append(SkippedPhoto(path, "a folder of 0 repeats: rename it to use it"))
            continue
        skipped += skipped_here
        if photos:
            _add_subject(
                subjects, name, [(photo, None) for photo in photos], reader, reasons, num_repeats
            )
        elif not skipped_here:
            reasons.append(
                f"{str(path)!r} holds no image, such as PNG, JPEG, WEBP or HEIC: "
                "put at least one there (no links elsewhere)"
            )
    subjects.sort(key=lambda subject: subject.name)
    for subject in [first for first, second in pairwise(subjects) if first.name == second.name]:
        reasons.append(
            f"{str(root)!r} holds two subjects called {subject.name!r}, one expected: "
            "rename one of them"
        )
        subjects.remove(subject)
    return subjects


def _parse_repeats(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Parse kohya's names of sub-folders: name and repeats by the name on disk.

    Returns:
        Nothing unless every name has a number, the rest of each is another one, and the numbers
        are no mere numbering, such as 1, 2, 3.
    """
    matches = [_REPEATS_NAME.fullmatch(name) for name in names]
    parsed = {
        name: (match[2].strip(), int(match[1]))
        for name, match in zip(names, matches, strict=True)
        if match
    }
    numbers = sorted(repeats for _, repeats in parsed.values())
    is_numbering = len(numbers) > 1 and all(b - a == 1 for a, b in pairwise(numbers))
    is_unique = len({name for name, _ in parsed.values()}) == len(names)
    return parsed if is_unique and not is_numbering else {}


def _select_photos(paths: Sequence[Path], root: Path, skipped: list[SkippedPhoto]) -> list[Path]:
    """Select the photos that are read; others are added to ``skipped``, other files ignored.

    Photos in folders among the paths are others, too.
    """
    photos = []
    for path in paths:
        if not is_within(path, root):
            is_photo = path.suffix.lower() in PHOTO_SUFFIXES or path.is_dir()
            reason = "a link out of the folder: put a copy there" if is_photo else ""
        elif path.is_dir():
            skipped += _list_nested_photos(path, root)
            continue
        elif path.suffix.lower() not in PHOTO_SUFFIXES:
            continue
        elif path.is_file():
            format_name = get_format_of_suffix(path)
            advice = explain_format(format_name)
            reason = f"{format_kind(format_name)}, {advice}" if advice else ""
            if not reason:
                photos.append(path)
        else:
            reason = "" if path.exists() else "a link to a file that is not there: mend it"
        if reason:
            skipped.append(SkippedPhoto(path, reason))
    return photos


def _list_nested_photos(folder: Path, root: Path) -> list[SkippedPhoto]:
    """List the photos in a folder within the folder of a subject."""
    try:
        return [SkippedPhoto(photo, _NESTED_REASON) for photo in walk_photos(folder, root)]
    except InvalidImageError:
        return [SkippedPhoto(folder, "a folder that cannot be read: check its permissions")]


def _read_entries(
    root: Path, layout: SubjectLayout, reasons: list[str]
) -> Mapping[str, list[PhotoEntry]]:
    """Read photos and captions by subject, where a list or numbers say who is shown."""
    if layout == "strangers":
        return list_strangers(root)
    if layout == "identity_file":
        return read_identity_file(root, reasons)
    if layout == "people":
        return read_people(root, reasons)
    return read_metadata(root, reasons)


def _make_subjects(
    entries: Mapping[str, list[PhotoEntry]],
    root: Path,
    reasons: list[str],
    skipped: list[SkippedPhoto],
) -> list[Subject]:
    reader = CaptionReader(root)
    subjects: list[Subject] = []
    for name, photos in sorted(entries.items()):
        paths = set(_select_photos([path for path, _ in photos], root, skipped))
        if selected := [entry for entry in photos if entry[0] in paths]:
            _add_subject(subjects, name, selected, reader, reasons)
    return subjects


def _format_no_subject(root: Path, reasons: Sequence[str], skipped: Sequence[SkippedPhoto]) -> str:
    """Say why a folder has no subject; name a sub-folder that has some."""
    for path in list_entries(root):
        images = (p for p in path.glob("*/*.*") if p.suffix.lower() in PHOTO_SUFFIXES)
        if path.is_dir() and next(images, None) is not None:
            return (
                f"{str(root)!r} holds folders of folders, a sub-folder of images per subject was "
                f"expected: name one level deeper, as {str(path)!r}"
            )
    if reasons:
        return reasons[0]
    if skipped:
        summary = summarize_skipped_photos(skipped, root)[0]
        return f"{str(root)!r} holds no photo that can be used, {summary}"
    return (
        f"{str(root)!r} holds no subject: put images there, such as PNG, JPEG, WEBP or HEIC, "
        "or one sub-folder of them per subject"
    )


def _add_subject(
    subjects: list[Subject],
    name: str,
    entries: Sequence[PhotoEntry],
    reader: CaptionReader,
    reasons: list[str],
    repeats: int = 1,
) -> None:
    """Add a subject, or the reason why it has none of the captions that it should have."""
    try:
        captions = tuple(caption or reader.read(photo) for photo, caption in entries)
    except InvalidImageError as error:
        reasons.append(str(error))
        return
    subjects.append(Subject(name, tuple(photo for photo, _ in entries), captions, repeats))
