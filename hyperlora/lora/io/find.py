"""Find a LoRA file in a folder by its name or by the title in its metadata."""

from collections.abc import Iterator
from difflib import get_close_matches
from os import PathLike
from pathlib import Path

from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.safetensors_file import read_metadata

_MAX_SUGGESTIONS = 3


def find_lora(folder: str | PathLike[str], name: str) -> Path:
    """Find a LoRA file by its file name, else by the title in its metadata.

    Args:
        folder: The folder, which is searched with its sub-folders.
        name: The file name, with or without suffix and sub-folder, or the title.

    Returns:
        The path of the file.

    Raises:
        InvalidArgumentError: No file or more than one has that name or title.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidArgumentError(f"{str(folder)!r} is no folder of LoRA files")
    files = sorted(f for f in folder.rglob("*.safetensors") if not f.name.startswith("."))
    stem = name.removesuffix(".safetensors")
    name_matches = [
        f for f in files if stem in (f.stem, f.relative_to(folder).with_suffix("").as_posix())
    ]
    if name_matches:
        return _select_single_match(name_matches, name)
    unreadable: list[str] = []
    titles = list(_read_titles(files, unreadable))
    if title_matches := [f for f, title in titles if title == name]:
        return _select_single_match(title_matches, name)
    known_names = [*(f.stem for f in files), *(title for _, title in titles if title)]
    suggestions = get_close_matches(name, known_names, _MAX_SUGGESTIONS)
    hint = (
        f"did you mean {' or '.join(map(repr, suggestions))}?"
        if suggestions
        else f"{len(files)} others are there"
    )
    note = f" (not readable: {'; '.join(unreadable)})" if unreadable else ""
    raise InvalidArgumentError(f"no LoRA called {name!r} in {str(folder)!r}: {hint}{note}")


def _select_single_match(matches: list[Path], name: str) -> Path:
    """The only match; raises ``InvalidArgumentError`` if there are more."""
    if len(matches) > 1:
        raise InvalidArgumentError(
            f"{len(matches)} LoRAs are called {name!r}: {', '.join(map(str, matches))}; "
            f"name its sub-folder"
        )
    return matches[0]


def _read_titles(files: list[Path], unreadable: list[str]) -> Iterator[tuple[Path, str]]:
    """Yield the title of every file; appends the errors of the others to ``unreadable``."""
    for file in files:
        try:
            yield file, LoraMetadata.from_safetensors_metadata(read_metadata(file)).title
        except (InvalidLoraFileError, OSError) as error:
            unreadable.append(str(error))
