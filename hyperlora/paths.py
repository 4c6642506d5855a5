"""``find_path``: a path as it stands on disk, whichever way its accents are written."""

import unicodedata
from pathlib import Path


def find_path(path: Path) -> Path:
    """Find a path whose letters are composed on disk and decomposed here, or the other way.

    é is one letter, or e and an accent (Unicode's NFC and NFD). Keyboards type the first, and
    copies from macOS hold the second; other file systems take the two for different names.

    Args:
        path: A path as a user writes it.

    Returns:
        The path itself if it exists; else the only one of equal letters; else the path itself.
    """
    if str(path).isascii() or _exists(path):
        return path
    anchor = Path(path.anchor)
    found = anchor
    for part in path.parts[len(anchor.parts) :]:
        candidate = found / part
        if not _exists(candidate):
            matches = _list_equal_names(found, part)
            if len(matches) != 1:
                return path
            (candidate,) = matches
        found = candidate
    return found


def _exists(path: Path) -> bool:
    """Whether there is such a path; False for names that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _list_equal_names(folder: Path, name: str) -> list[Path]:
    """List what a folder holds under equal letters; nothing where it cannot be read."""
    composed_name = unicodedata.normalize("NFC", name)
    try:
        return [
            path
            for path in folder.iterdir()
            if unicodedata.normalize("NFC", path.name) == composed_name
        ]
    except OSError:
        return []
