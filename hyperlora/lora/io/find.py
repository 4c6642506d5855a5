"""A folder of LoRA files, found by name as galleries do: the file's name, else the title in its header."""

from collections.abc import Iterator
from difflib import get_close_matches
from os import PathLike
from pathlib import Path

from hyperlora.errors import BadLoraFile, BadRequest
from hyperlora.lora.io.metadata import LoraHeader
from hyperlora.lora.io.safetensors_file import read_metadata


def find_lora(folder: str | PathLike[str], name: str) -> Path:
    """The ``.safetensors`` file in ``folder`` or below it that is called ``name`` (with or without suffix, or with its
    sub-folder), else the one whose header has that title.

    Raises ``BadRequest`` if there is none (with the nearest names) or more than one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadRequest(f"{str(folder)!r} is no folder of LoRA files")
    files = sorted(f for f in folder.rglob("*.safetensors") if not f.name.startswith("."))
    wanted = name.removesuffix(".safetensors")
    called = [f for f in files if wanted in (f.stem, f.relative_to(folder).with_suffix("").as_posix())]
    if called:
        return _only(called, name)
    broken: list[str] = []
    titles = list(_titles(files, broken))
    if titled := [f for f, title in titles if title == name]:
        return _only(titled, name)
    near = get_close_matches(name, [*(f.stem for f in files), *(t for _, t in titles if t)], 3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"{len(files)} others are there"
    note = f" (not readable: {'; '.join(broken)})" if broken else ""
    raise BadRequest(f"no LoRA called {name!r} in {str(folder)!r}: {hint}{note}")


def _only(found: list[Path], name: str) -> Path:
    if len(found) > 1:
        raise BadRequest(f"{len(found)} LoRAs are called {name!r}: {', '.join(map(str, found))}; name its sub-folder")
    return found[0]


def _titles(files: list[Path], broken: list[str]) -> Iterator[tuple[Path, str]]:
    for file in files:
        try:
            yield file, LoraHeader.from_metadata(read_metadata(file)).title
        except (BadLoraFile, OSError) as error:
            broken.append(str(error))
