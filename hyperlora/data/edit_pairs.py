"""Before/after pairs from plain folders and from the layouts of the public datasets of edits.

* A folder of ``NAME_before.png`` and ``NAME_after.png``, and perhaps ``NAME.txt`` or
  ``NAME.caption`` with the instruction.
* InstructPix2Pix's ``clip-filtered`` folders: ``seeds.json``, and in each sub-folder
  ``prompt.json``, ``SEED_0.jpg`` and ``SEED_1.jpg`` (2211.09800).
* SEED-Data-Edit: ``*.jsonl`` with ``source_image``, ``target_image`` and ``instruction``, paths
  relative to the folder (2405.04007).
* A Hugging Face dataset: a hub id, or a local folder of Parquet files or of ``save_to_disk``. The
  columns are MagicBrush's ``source_img``, ``target_img``, ``instruction`` (2306.10012), or other
  usual names.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, overload

from PIL import Image

from hyperlora.data.captions import CaptionReader, parse_caption, read_text
from hyperlora.data.hub_dataset import is_saved_dataset, load_hub_dataset
from hyperlora.data.images import ImageSource, list_entries, list_image_files, read_image
from hyperlora.data.photos import get_cell_bytes
from hyperlora.errors import InvalidArgumentError, InvalidImageError

_BEFORE_COLUMNS: Final = ("source_img", "original_image", "source_image", "input_image", "before")
_AFTER_COLUMNS: Final = ("target_img", "edited_image", "target_image", "output_image", "after")
_INSTRUCTION_COLUMNS: Final = ("instruction", "edit_prompt", "edit", "prompt")


@dataclass(frozen=True)
class ImagePair:
    """An image before and after an edit, not read yet.

    Attributes:
        name: The name of the pair.
        before: The image before the edit.
        after: The image after it.
        instruction: The text instruction of the edit; empty if unknown.
    """

    name: str
    before: ImageSource
    after: ImageSource
    instruction: str = ""


def load_edit_pairs(source: str | Path, split: str = "train") -> Sequence[ImagePair]:
    """List the pairs of a folder or of a Hugging Face dataset.

    Args:
        source: The folder or the hub id; datasets need the extra ``data``.
        split: The split of a dataset; folders have none.

    Returns:
        The pairs; images are read later.

    Raises:
        InvalidImageError: The folder holds no pair, or half of one.
        InvalidArgumentError: The dataset cannot be loaded, or its columns or files are malformed.
    """
    folder = Path(source)
    if not folder.exists():
        return HubEditPairs(str(source), split)
    if (folder / "seeds.json").is_file():
        return list(_read_instruct_pix2pix(folder))
    if is_saved_dataset(folder):
        return HubEditPairs(str(source), split)
    suffixes = {p.suffix for p in list_entries(folder)}
    if ".jsonl" in suffixes:
        return list(_read_seed_data_edit(folder))
    if ".parquet" in suffixes or any(folder.glob("data/*.parquet")):
        return HubEditPairs(str(source), split)
    return list_named_pairs(folder)


def list_named_pairs(folder: str | Path) -> list[ImagePair]:
    """List the pairs ``NAME_before.*`` and ``NAME_after.*`` of a folder.

    Args:
        folder: The folder.

    Returns:
        The pairs, sorted by name, with the instruction of ``NAME.txt``.

    Raises:
        InvalidImageError: There is no pair, or half of one.
    """
    sides_by_name: dict[str, dict[str, Path]] = {}
    for path in list_image_files(folder):
        name, _, side = path.stem.rpartition("_")
        side = side.lower()
        if side not in ("before", "after"):
            continue
        if (first := sides_by_name.setdefault(name, {}).setdefault(side, path)) is not path:
            raise InvalidImageError(
                f"{str(path)!r} and {first.name!r} are both the image {side}: remove one of them"
            )
    if not sides_by_name:
        raise InvalidImageError(
            f"{str(folder)!r} holds no pair: "
            "files named NAME_before.png and NAME_after.png are expected"
        )
    if incomplete_pair := next((sides for sides in sides_by_name.values() if len(sides) < 2), None):
        ((side, path),) = incomplete_pair.items()
        opposite_side = {"before": "after", "after": "before"}
        raise InvalidImageError(
            f"{str(path)!r} has no image {opposite_side[side]} beside it: "
            "add it, or remove this one"
        )
    reader = CaptionReader(Path(folder))
    return [
        ImagePair(
            name,
            sides["before"],
            sides["after"],
            reader.read_text_of(Path(folder), name) or "",
        )
        for name, sides in sorted(sides_by_name.items())
    ]


class HubEditPairs(Sequence[ImagePair]):
    """The pairs of a Hugging Face dataset, decoded on access.

    Args:
        source: The hub id, or a local folder.
        split: The split.

    Raises:
        InvalidArgumentError: The dataset cannot be loaded, or lacks the columns.
    """

    def __init__(self, source: str, split: str) -> None:
        dataset = load_hub_dataset(source, split, "pairs")
        self.source = source
        self.image_columns = [
            _find_column(dataset.column_names, names, source)
            for names in (_BEFORE_COLUMNS, _AFTER_COLUMNS)
        ]
        self.instruction_column = next(
            (name for name in _INSTRUCTION_COLUMNS if name in dataset.column_names), None
        )
        import datasets

        for name in self.image_columns:  # ``read_image`` decodes, and converts colors
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        self.dataset = dataset

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> ImagePair: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImagePair]: ...
    def __getitem__(self, index: int | slice) -> ImagePair | list[ImagePair]:
        """Read a pair, or the pairs of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.dataset[index]
        name = f"{self.source}#{index}"
        before, after = (get_cell_bytes(row[column], name) for column in self.image_columns)
        instruction = parse_caption(row[self.instruction_column]) if self.instruction_column else ""
        return ImagePair(name, before, after, instruction or "")


def _read_instruct_pix2pix(folder: Path) -> Iterator[ImagePair]:
    for name, seeds in _read_json(folder / "seeds.json"):
        instruction = str(_read_json(folder / name / "prompt.json").get("edit", ""))
        for seed in seeds:
            before, after = (folder / name / f"{seed}_{i}.jpg" for i in (0, 1))
            yield ImagePair(f"{name}/{seed}", before, after, instruction)


def _read_seed_data_edit(folder: Path) -> Iterator[ImagePair]:
    for file in sorted(folder.glob("*.jsonl")):
        for line_index, line in enumerate(read_text(file).splitlines()):
            if not line.strip():
                continue
            try:
                row: dict[str, Any] = json.loads(line)
                before, after = folder / row["source_image"], folder / row["target_image"]
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidArgumentError(
                    f"{str(file)!r}, line {line_index + 1}: source_image and target_image "
                    "expected; correct or remove the line"
                ) from error
            yield ImagePair(
                f"{file.stem}#{line_index}", before, after, str(row.get("instruction", ""))
            )


def _find_column(column_names: Sequence[str], candidates: Sequence[str], source: str) -> str:
    if name := next((name for name in candidates if name in column_names), None):
        return name
    raise InvalidArgumentError(
        f"{source!r} has the columns {', '.join(column_names)}; "
        f"one of {', '.join(candidates)} was expected"
    )


def _read_json(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(read_text(path))
    except (InvalidImageError, ValueError) as error:
        raise InvalidArgumentError(
            f"{str(path)!r} cannot be read as JSON ({error}): fetch the dataset again"
        ) from error


def read_image_pair(before: ImageSource, after: ImageSource) -> tuple[Image.Image, Image.Image]:
    """Read the two images of a pair.

    Args:
        before: The image before the edit.
        after: The image after it.

    Returns:
        Both images in RGB.

    Raises:
        InvalidImageError: An image cannot be read.
        InvalidArgumentError: Their sizes differ, so that pixels do not correspond.
    """
    before_image, after_image = read_image(before), read_image(after)
    check_pair_sizes(before_image, after_image)
    return before_image, after_image


def check_pair_sizes(before: Image.Image, after: Image.Image) -> None:
    """Check that the pixels of a pair correspond.

    Args:
        before: The image before the edit.
        after: The image after it.

    Raises:
        InvalidArgumentError: The sizes differ.
    """
    if before.size != after.size:
        raise InvalidArgumentError(
            f"the image before is {before.width}×{before.height}, "
            f"the one after {after.width}×{after.height}: "
            "the same size is expected, so crop or turn one of them"
        )
