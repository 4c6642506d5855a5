"""Before/after pairs from anywhere: plain folders, and the layouts of the public datasets of edits.

* a folder of ``NAME_before.png`` and ``NAME_after.png`` (and, if there is one, ``NAME.txt`` with the instruction)
* InstructPix2Pix's ``clip-filtered`` folders: ``seeds.json``, and in each folder ``prompt.json`` and ``SEED_0.jpg``,
  ``SEED_1.jpg`` (2211.09800)
* SEED-Data-Edit: ``*.jsonl`` of ``source_image``, ``target_image``, ``instruction``, paths relative to the folder
  (2405.04007)
* a Hugging Face dataset by id, or a local folder of its Parquet files or of ``save_to_disk``: MagicBrush's
  ``source_img``, ``target_img``, ``instruction`` (2306.10012), and others' names of these columns
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, overload

from PIL import Image

from hyperlora.data.images import Source, entries, image_files, read_image
from hyperlora.errors import BadImage, BadRequest

_BEFORE: Final = ("source_img", "original_image", "source_image", "input_image", "before")
_AFTER: Final = ("target_img", "edited_image", "target_image", "output_image", "after")
_WORDS: Final = ("instruction", "edit_prompt", "edit", "prompt")


@dataclass(frozen=True)
class ImagePair:
    """A picture before and after an edit, not read yet, and what was asked for (perhaps nothing)."""

    name: str
    before: Source
    after: Source
    instruction: str = ""


def pairs_in(source: str | Path, split: str = "train") -> Sequence[ImagePair]:
    """The pairs of a folder or of a Hugging Face dataset (extra ``data``), whose ``split`` is taken.

    Raises ``BadImage`` for a folder without pairs, ``BadRequest`` for a dataset without the columns.
    """
    folder = Path(source)
    if not folder.exists():
        return HubPairs(str(source), split)
    if (folder / "seeds.json").is_file():
        return list(_instruct_pix2pix(folder))
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return HubPairs(str(source), split)
    names = {p.suffix for p in entries(folder)}
    if ".jsonl" in names:
        return list(_seed_data_edit(folder))
    if ".parquet" in names or any(folder.glob("data/*.parquet")):
        return HubPairs(str(source), split)
    return named_pairs(folder)


def named_pairs(folder: str | Path) -> list[ImagePair]:
    """``NAME_before.*`` with ``NAME_after.*``, sorted by name. Raises ``BadImage`` if there is none, or a half."""
    found: dict[str, dict[str, Path]] = {}
    for path in image_files(folder):
        name, _, side = path.stem.rpartition("_")
        if side in ("before", "after"):
            found.setdefault(name, {})[side] = path
    if not found:
        raise BadImage(f"{str(folder)!r} holds no pair: files named NAME_before.png and NAME_after.png are expected")
    if alone := next((sides for sides in found.values() if len(sides) < 2), None):
        ((side, path),) = alone.items()
        other = {"before": "after", "after": "before"}
        raise BadImage(f"{str(path)!r} has no picture {other[side]} beside it: add it, or remove this one")
    return [
        ImagePair(name, sides["before"], sides["after"], _text(sides["before"].with_name(f"{name}.txt")))
        for name, sides in sorted(found.items())
    ]


class HubPairs(Sequence[ImagePair]):
    """The pairs of a Hugging Face dataset, decoded when they are asked for."""

    def __init__(self, source: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise BadRequest("reading Hugging Face datasets needs the extra: pip install 'hyperlora[data]'") from error
        on_disk = any((Path(source) / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
        try:
            rows = datasets.load_from_disk(source) if on_disk else datasets.load_dataset(source, split=split)
            if isinstance(rows, Mapping):
                rows = rows[split]
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadRequest(
                f"{source!r}, split {split!r}, is neither a folder of pairs nor a dataset ({reason})"
            ) from error
        self.rows, self.source = rows, source
        self.columns = [_column(rows.column_names, names, source) for names in (_BEFORE, _AFTER)]
        self.words = next((name for name in _WORDS if name in rows.column_names), None)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> ImagePair: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImagePair]: ...
    def __getitem__(self, index: int | slice) -> ImagePair | list[ImagePair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        before, after = (row[name] for name in self.columns)
        return ImagePair(f"{self.source}#{index}", before, after, str(row[self.words]) if self.words else "")


def _instruct_pix2pix(folder: Path) -> Iterator[ImagePair]:
    for name, seeds in _json(folder / "seeds.json"):
        words = str(_json(folder / name / "prompt.json").get("edit", ""))
        for seed in seeds:
            before, after = (folder / name / f"{seed}_{i}.jpg" for i in (0, 1))
            yield ImagePair(f"{name}/{seed}", before, after, words)


def _seed_data_edit(folder: Path) -> Iterator[ImagePair]:
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            if not line.strip():
                continue
            try:
                row: dict[str, Any] = json.loads(line)
                before, after = folder / row["source_image"], folder / row["target_image"]
            except (ValueError, KeyError, TypeError) as error:
                raise BadRequest(
                    f"{str(file)!r}, line {number + 1}: source_image and target_image expected; mend or remove the line"
                ) from error
            yield ImagePair(f"{file.stem}#{number}", before, after, str(row.get("instruction", "")))


def _column(found: Sequence[str], names: Sequence[str], source: str) -> str:
    if name := next((name for name in names if name in found), None):
        return name
    raise BadRequest(f"{source!r} has the columns {', '.join(found)}; one of {', '.join(names)} was expected")


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"{str(file)!r} cannot be read as JSON ({error}): fetch the dataset again") from error


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def read_pair(before: Source, after: Source) -> tuple[Image.Image, Image.Image]:
    """Both pictures. Raises ``BadRequest`` if they are not of the same size: what changed cannot be told then."""
    a, b = read_image(before), read_image(after)
    if a.size != b.size:
        raise BadRequest(
            f"the picture before is {a.width}×{a.height}, the one after {b.width}×{b.height}: the same size is "
            f"expected, so crop or turn one of them"
        )
    return a, b
