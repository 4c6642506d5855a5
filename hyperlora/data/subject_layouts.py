"""Layouts of folders of photos: who is on which photo, as collections of photos say it.

* ``folders``: a sub-folder for each subject, or an image directly in the folder for each subject.
* ``strangers``: every image below the folder shows another subject. FFHQ is recognized by its
  numbered folders, ``00000/00000.png`` to ``00999.png`` (1812.04948).
* ``identity_file``: CelebA's ``identity_CelebA.txt`` with lines ``000001.jpg 2880`` (1411.7766), or
  CelebA-HQ's numbers with ``CelebA-HQ-to-CelebA-mapping.txt`` beside it (1710.10196).
* ``metadata``: ``metadata.csv`` or ``metadata.jsonl`` of Hugging Face's image folders, with columns
  ``file_name``, perhaps ``person_id`` and ``text``.
* ``people``: ``people.jsonl`` of ``data-builder people``, with a sub-folder for each person kept.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, get_args

from hyperlora.data.captions import (
    FILE_COLUMNS,
    METADATA_NAMES,
    find_metadata,
    get_caption,
    get_first,
    read_rows,
    read_text,
)
from hyperlora.data.image_formats import PHOTO_SUFFIXES
from hyperlora.data.images import is_within, list_entries
from hyperlora.errors import InvalidImageError
from hyperlora.paths import find_path

SubjectLayout = Literal["folders", "strangers", "identity_file", "metadata", "people"]
LAYOUTS: Final = get_args(SubjectLayout)
PhotoEntry = tuple[Path, str | None]
"""A photo and its caption, if the layout states one."""

IDENTITY_COLUMNS: Final = (
    *("person_id", "identity", "identity_id", "subject", "subject_id", "person", "celeb_id"),
    *("label", "name"),
)
"""Usual names of the column that says who is shown, the surest first."""
PEOPLE_FILE: Final = "people.jsonl"
"""A line for each person with its name, ``person``, and whether it is ``kept``."""
_MIN_NUMBERED_IMAGES: Final = 10
"""Images per folder, on average, below which numbered folders are subjects."""
_NUM_ERRORS_SHOWN: Final = 3


def recognize_layout(folder: Path) -> SubjectLayout:
    """Recognize the layout of a folder.

    Args:
        folder: The folder.

    Returns:
        The layout; ``folders`` unless there is a sign of another one.

    Raises:
        InvalidImageError: The folder cannot be read.
    """
    entries = list_entries(folder)
    if any(path.name in METADATA_NAMES for path in entries):
        return "metadata"
    if any(path.name == PEOPLE_FILE for path in entries):
        return "people"
    if find_identity_file(folder) is not None:
        return "identity_file"
    return "strangers" if has_numbered_folders(folder) else "folders"


def has_numbered_folders(folder: Path) -> bool:
    """Check whether images are numbered through all sub-folders, as FFHQ's are.

    The name of a sub-folder is the lowest number that its images may have. So a folder of one
    subject, ``7/1.jpg``, ``7/2.jpg``, is none of these.

    Args:
        folder: The folder.

    Returns:
        Whether every sub-folder and image has a number of as many digits, in the right range.
    """
    names = sorted(p.name for p in list_entries(folder) if p.is_dir())
    if not names or not all(name.isdecimal() and len(name) == len(names[0]) for name in names):
        return False
    if any(p.suffix.lower() in PHOTO_SUFFIXES for p in list_entries(folder)):
        return False
    starts = [int(name) for name in names]
    step = min((second - first for first, second in pairwise(starts)), default=1000)
    num_images = 0
    for name, start in zip(names, starts, strict=True):
        stems = [p.stem for p in _list_images(folder / name)]
        if not all(stem.isdecimal() and len(stem) == len(name) for stem in stems):
            return False
        if not all(start <= int(stem) < start + step for stem in stems):
            return False
        num_images += len(stems)
    return num_images >= _MIN_NUMBERED_IMAGES * len(names)


def list_strangers(folder: Path) -> dict[str, list[PhotoEntry]]:
    """List every image below a folder as a subject of its own.

    Args:
        folder: The folder.

    Returns:
        One photo by subject; the name is the path without suffix, or only its last part where
        these are unique.
    """
    paths = [path for path in walk_photos(folder, folder) if is_within(path, folder)]
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return {path.stem: [(path, None)] for path in paths}
    subjects: dict[str, list[PhotoEntry]] = {}
    for path in paths:
        relative_path = path.relative_to(folder)
        name = str(relative_path.with_suffix(""))
        subjects[str(relative_path) if name in subjects else name] = [(path, None)]
    return subjects


def find_identity_file(folder: Path) -> Path | None:
    """Find CelebA's list of identities, in the folder or in its ``Anno``.

    Args:
        folder: The folder.

    Returns:
        The file; None if there is none.
    """
    paths = (p for parent in (folder, folder / "Anno") for p in parent.glob("identity*.txt"))
    return next((path for path in sorted(paths) if path.is_file()), None)


def read_identity_file(folder: Path, skip_reasons: list[str]) -> dict[str, list[PhotoEntry]]:
    """Read who is shown from CelebA's list of identities.

    Images without a line are left out. With ``CelebA-HQ-to-CelebA-mapping.txt``, images are named
    by the numbers of CelebA-HQ.

    Args:
        folder: The folder with images, below it, and the list.
        skip_reasons: Receives why images are left out.

    Returns:
        Photos by identity.

    Raises:
        InvalidImageError: There is no list, or a line has not two words.
    """
    path = find_identity_file(folder)
    if path is None:
        raise InvalidImageError(
            f"{str(folder)!r} holds no list of identities: put identity_CelebA.txt there, "
            "with a file name and an identity in each line"
        )
    identities = {words[0]: words[1] for words in _read_table(path, 2)}
    mapping_path = next(iter(sorted(folder.glob("*HQ-to-CelebA*.txt"))), None)
    if mapping_path is not None:
        # idx, orig_idx, orig_file, and check sums
        rows = [words for words in _read_table(mapping_path, None) if words[0].isdecimal()]
        identities = {
            str(int(words[0])): identities[words[2]]
            for words in rows
            if len(words) > 2 and words[2] in identities
        }
    subjects: dict[str, list[PhotoEntry]] = {}
    missing = []
    for image in walk_photos(folder, folder):
        names = [image.name, image.stem, image.stem.lstrip("0") or "0"]
        names = names if mapping_path is not None else [image.name, f"{image.stem}.jpg"]
        identity = next((identities[name] for name in names if name in identities), None)
        if identity is None:
            missing.append(image.name)
        else:
            subjects.setdefault(identity, []).append((image, None))
    if missing:
        skip_reasons.append(
            f"{len(missing)} images have no line in {path.name} ({_join_first(missing)})"
        )
    return subjects


def read_metadata(folder: Path, skip_reasons: list[str]) -> dict[str, list[PhotoEntry]]:
    """Read who is shown from ``metadata.csv`` or ``metadata.jsonl``.

    Without a column of identities, images in sub-folders belong to the subject of the sub-folder,
    and images directly in the folder show one subject each.

    Args:
        folder: The folder.
        skip_reasons: Receives why rows are left out.

    Returns:
        Photos and captions by subject.

    Raises:
        InvalidImageError: There is no such file, or it cannot be understood.
    """
    path = find_metadata(folder)
    if path is None:
        raise InvalidImageError(
            f"{str(folder)!r} holds no metadata: put metadata.csv or metadata.jsonl there, "
            "with columns file_name and person_id"
        )
    subjects: dict[str, list[PhotoEntry]] = {}
    missing, unnamed = [], []
    column = find_metadata_column(folder)
    for row in read_rows(path):
        file_name = get_first(row, FILE_COLUMNS)
        if file_name is None:
            raise InvalidImageError(
                f"{str(path)!r} has the columns {', '.join(row)}, file_name expected: "
                "name the column of images so"
            )
        image = _locate_image(folder, file_name)
        if not image.is_file() or not is_within(image, folder):
            missing.append(file_name)
            continue
        name = get_first(row, (column,)) if column else _get_folder_name(image.relative_to(folder))
        if name is None:
            unnamed.append(file_name)
            continue
        subjects.setdefault(name, []).append((image, get_caption(row)))
    if missing:
        skip_reasons.append(
            f"{len(missing)} rows of {path.name} name files that are not there "
            f"({_join_first(missing)})"
        )
    if unnamed:
        skip_reasons.append(f"{len(unnamed)} rows have no {column} ({_join_first(unnamed)})")
    return subjects


def read_people(folder: Path, skip_reasons: list[str]) -> dict[str, list[PhotoEntry]]:
    """Read who was kept from ``people.jsonl``; the sheet and a build beside it are no subjects.

    Args:
        folder: The folder.
        skip_reasons: Receives which people have no folder.

    Returns:
        Photos by person.

    Raises:
        InvalidImageError: There is no such file, or it cannot be read.
    """
    rows = list(read_rows(folder / PEOPLE_FILE))
    names = [get_first(row, ("person",)) for row in rows if row.get("kept")]
    subjects: dict[str, list[PhotoEntry]] = {}
    missing: list[str] = []
    for name in filter(None, names):
        person_dir = folder / name
        if person_dir.is_dir() and is_within(person_dir, folder):
            subjects[name] = [(photo, None) for photo in _list_images(person_dir)]
        else:
            missing.append(name)
    if missing:
        skip_reasons.append(
            f"{len(missing)} people of {PEOPLE_FILE} have no folder ({_join_first(missing)})"
        )
    return subjects


def list_photos_without_row(folder: Path) -> list[Path]:
    """List the photos below a folder of which its metadata say nothing."""
    path = find_metadata(folder)
    names = (get_first(row, FILE_COLUMNS) for row in read_rows(path)) if path else ()
    known = {_locate_image(folder, name) for name in names if name}
    return [photo for photo in walk_photos(folder, folder) if photo not in known]


def find_metadata_column(folder: Path) -> str | None:
    """Find the column that says who is shown in the metadata of a folder.

    Args:
        folder: The folder, with ``metadata.csv`` or ``metadata.jsonl``.

    Returns:
        Its name; None if the first row has none of the usual ones.
    """
    path = find_metadata(folder)
    first_row = next(read_rows(path), {}) if path else {}
    return next((name for name in IDENTITY_COLUMNS if name in first_row), None)


def _locate_image(folder: Path, file_name: str) -> Path:
    """The image of a row; programs on Windows write its folders with backslashes."""
    path = find_path(folder / file_name)
    return path if path.is_file() else find_path(folder / file_name.replace("\\", "/"))


def _get_folder_name(path: Path) -> str:
    """The sub-folder of an image, or its own name without suffix."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def _read_table(path: Path, num_words: int | None) -> Iterator[list[str]]:
    """Read the words of each line; None: any number of them."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if num_words is not None and len(words) != num_words:
            raise InvalidImageError(
                f"{str(path)!r}, line {number}: {num_words} words were expected, as "
                f"'000001.jpg 2880', and {len(words)} found"
            )
        yield words


def walk_photos(folder: Path, root: Path, parents: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Iterate over all photos below a folder, also those that are not read.

    Args:
        folder: The folder.
        root: Links out of this folder are not followed, nor those back to a folder above them.
        parents: The folders above, with all links followed.

    Yields:
        The files, sorted, without hidden names.
    """
    parents |= {folder.resolve()}
    for path in list_entries(folder):
        if path.is_dir():
            if is_within(path, root) and path.resolve() not in parents:
                yield from walk_photos(path, root, parents)
        elif path.suffix.lower() in PHOTO_SUFFIXES and path.is_file():
            yield path


def _list_images(folder: Path) -> list[Path]:
    return [p for p in list_entries(folder) if p.suffix.lower() in PHOTO_SUFFIXES]


def _join_first(names: Sequence[str]) -> str:
    """The first names, and whether there are more."""
    suffix = ", ..." if len(names) > _NUM_ERRORS_SHOWN else ""
    return ", ".join(names[:_NUM_ERRORS_SHOWN]) + suffix
