"""Who is in a folder of photos."""

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from hyperlora.data.images import SUFFIXES, entries, image_files, is_inside
from hyperlora.errors import BadImage

MAX_CAPTION_BYTES: Final = 64_000


@dataclass(frozen=True)
class Subject:
    """One person or thing: its photos, and beside each photo a caption or ``None``."""

    name: str
    photos: tuple[Path, ...]
    captions: tuple[str | None, ...]


def subjects_in(folder: str | os.PathLike[str], skipped: list[str] | None = None) -> list[Subject]:
    """Each sub-folder is a subject with several photos, each image directly in ``folder`` a subject of its own.

    A caption is the first line of the ``.txt`` beside the photo (``me.jpg``, ``me.txt``), as in kohya's scripts. Hidden
    files do not count, nor do links that lead out of ``folder``. Sorted by name. Raises ``BadImage`` if there is no
    subject, a sub-folder holds no image, or two subjects share a name; with a list of ``skipped``, subjects that cannot
    be listed are left out and why is added to it.
    """
    root = Path(folder)
    found = [p for p in entries(root) if is_inside(p, root)]
    subjects = []
    for p in found:
        try:
            if p.is_dir():
                subjects.append(_subject(p.name, image_files(p, within=root), root))
            elif p.suffix.lower() in SUFFIXES and p.is_file():
                subjects.append(_subject(p.stem, [p], root))
        except BadImage as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    if not subjects:
        raise BadImage(
            f"{str(root)!r} holds no subject: put PNG, JPEG or WEBP images there, or one sub-folder of them per subject"
        )
    subjects.sort(key=lambda subject: subject.name)
    twice = [one for one, other in pairwise(subjects) if one.name == other.name]
    for subject in twice:
        reason = f"{str(root)!r} holds two subjects called {subject.name!r}, one expected: rename one of them"
        if skipped is None:
            raise BadImage(reason)
        skipped.append(reason)
        subjects.remove(subject)
    return subjects


def _subject(name: str, photos: list[Path], root: Path) -> Subject:
    return Subject(name, tuple(photos), tuple(_caption(photo, root) for photo in photos))


def _caption(photo: Path, root: Path) -> str | None:
    path = photo.with_suffix(".txt")
    if not path.is_file() or not is_inside(path, root):
        return None
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CAPTION_BYTES + 1).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadImage(
            f"the caption {str(path)!r} cannot be read as UTF-8 text: save it as such, or remove it"
        ) from error
    if len(text) > MAX_CAPTION_BYTES:
        raise BadImage(f"the caption {str(path)!r} is longer than {MAX_CAPTION_BYTES} bytes: shorten it")
    lines = text.splitlines()
    return (lines[0].strip() or None) if lines else None
