"""Find a LoRA file in a folder by its name, or by a name in its metadata."""

import unicodedata
from collections.abc import Iterator
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Final

from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.safetensors_file import read_metadata
from hyperlora.paths import find_path

_SUFFIX: Final = ".safetensors"
_MAX_SUGGESTIONS: Final = 3


def find_lora(folder: str | PathLike[str], name: str) -> Path:
    """Find a LoRA file by its file name, else by the title or output name in its metadata.

    Files decide before metadata, so no header can take the name of another file. Composed and
    decomposed letters are equal (macOS stores é as e and an accent), and so are ``\\`` and ``/``.

    Args:
        folder: The folder, which is searched with its sub-folders.
        name: The file name, with or without suffix and sub-folder, ``./`` for this folder alone;
            or the title, or kohya's ``ss_output_name``, by which A1111 calls a LoRA.

    Returns:
        The path of the file.

    Raises:
        InvalidArgumentError: No file or more than one has that name.
    """
    folder = find_path(Path(folder))
    if not folder.is_dir():
        raise InvalidArgumentError(f"{str(folder)!r} is no folder of LoRA files")
    stems = {
        path: _normalize_name(str(path.relative_to(folder))) for path in list_lora_files(folder)
    }
    stem = _normalize_name(name)
    is_top_level = stem.startswith("./")
    stem = stem.removeprefix("./")
    if name_matches := [
        path
        for path, path_stem in stems.items()
        if stem == path_stem or (not is_top_level and stem == path_stem.rsplit("/", 1)[-1])
    ]:
        return _select_single_match(name_matches, name)
    unreadable: list[str] = []
    names_by_path = dict(_read_names(list(stems), unreadable))
    if metadata_matches := [path for path, names in names_by_path.items() if stem in names]:
        return _select_single_match(metadata_matches, name)
    known_names = {path_stem.rsplit("/", 1)[-1] for path_stem in stems.values()}
    known_names |= {known_name for names in names_by_path.values() for known_name in names}
    hint = _suggest_names(stem, sorted(known_names)) or f"{len(stems)} others are there"
    note = f" (not readable: {'; '.join(unreadable)})" if unreadable else ""
    raise InvalidArgumentError(f"no LoRA called {name!r} in {str(folder)!r}: {hint}{note}")


def list_lora_files(folder: Path) -> list[Path]:
    """List the safetensors files of a folder and its sub-folders, with a suffix in any case.

    Args:
        folder: The folder.

    Returns:
        Sorted paths; hidden files are left out.
    """
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() == _SUFFIX and not path.name.startswith(".") and path.is_file()
    )


def _normalize_name(name: str) -> str:
    """Write a name with composed letters and ``/``, and without the suffix of a LoRA file."""
    text = unicodedata.normalize("NFC", name.strip()).replace("\\", "/")
    return text[: -len(_SUFFIX)] if text.lower().endswith(_SUFFIX) else text


def _select_single_match(matches: list[Path], name: str) -> Path:
    """The only match; raises ``InvalidArgumentError`` if there are more."""
    if len(matches) > 1:
        raise InvalidArgumentError(
            f"{len(matches)} LoRAs are called {name!r}: {', '.join(map(str, matches))}; "
            f"name its sub-folder, or write ./NAME for a file outside of sub-folders"
        )
    return matches[0]


def _read_names(paths: list[Path], unreadable: list[str]) -> Iterator[tuple[Path, frozenset[str]]]:
    """Yield title and output name of every file; appends other files' errors to ``unreadable``."""
    for path in paths:
        try:
            metadata = LoraMetadata.from_safetensors_metadata(read_metadata(path))
        except (InvalidLoraFileError, OSError) as error:
            unreadable.append(str(error))
            continue
        names = {_normalize_name(text) for text in (metadata.title, metadata.output_name) if text}
        yield path, frozenset(names)


def _suggest_names(name: str, known_names: list[str]) -> str:
    """Format the known names that are most like a name; empty if none is."""
    names_by_folded = {known_name.casefold(): known_name for known_name in known_names}
    matches = get_close_matches(name.casefold(), list(names_by_folded), _MAX_SUGGESTIONS)
    suggestions = [repr(names_by_folded[match]) for match in matches]
    return f"did you mean {' or '.join(suggestions)}?" if suggestions else ""
