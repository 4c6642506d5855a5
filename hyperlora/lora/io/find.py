"""A folder of LoRA files, found by name as galleries do: the file's name, else the title in its header."""

from collections.abc import Iterator
from difflib import get_close_matches
from os import PathLike
from pathlib import Path

from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.safetensors_file import read_metadata


def find_lora(folder: str | PathLike[str], name: str) -> Path:
    """The ``.safetensors`` file in ``folder`` or below it that is called ``name`` (with or without suffix, or with its
    sub-folder), else the one whose header has that title.

    Raises ``InvalidArgumentError`` if there is none (with the nearest names) or more than one.
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
    suggestions = get_close_matches(
        name, [*(f.stem for f in files), *(t for _, t in titles if t)], 3
    )
    hint = (
        f"did you mean {' or '.join(map(repr, suggestions))}?"
        if suggestions
        else f"{len(files)} others are there"
    )
    note = f" (not readable: {'; '.join(unreadable)})" if unreadable else ""
    raise InvalidArgumentError(f"no LoRA called {name!r} in {str(folder)!r}: {hint}{note}")


def _select_single_match(matches: list[Path], name: str) -> Path:
    if len(matches) > 1:
        raise InvalidArgumentError(
            f"{len(matches)} LoRAs are called {name!r}: {', '.join(map(str, matches))}; name its sub-folder"
        )
    return matches[0]


def _read_titles(files: list[Path], unreadable: list[str]) -> Iterator[tuple[Path, str]]:
    for file in files:
        try:
            yield file, LoraMetadata.from_safetensors_metadata(read_metadata(file)).title
        except (InvalidLoraFileError, OSError) as error:
            unreadable.append(str(error))
