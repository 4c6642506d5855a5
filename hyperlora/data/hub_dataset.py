"""Hugging Face datasets: by id, or from a folder of Parquet files or of ``save_to_disk``."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hyperlora.errors import InvalidArgumentError, format_reason

if TYPE_CHECKING:
    from datasets import Dataset

_SAVED_DATASET_FILES: Final = ("dataset_info.json", "dataset_dict.json")


def is_saved_dataset(folder: Path) -> bool:
    """Check whether ``save_to_disk`` of Hugging Face datasets wrote a folder."""
    return any((folder / name).is_file() for name in _SAVED_DATASET_FILES)


def load_hub_dataset(source: str, split: str, contents: str) -> "Dataset":
    """Load one split of a Hugging Face dataset (extra ``data``).

    Args:
        source: Hub id, folder of Parquet files, or folder of ``save_to_disk``.
        split: Name of the split, e.g. ``train``.
        contents: Plural noun of what is read, for the error message, e.g. ``pairs``.

    Returns:
        The rows of the split; images are decoded on access.

    Raises:
        InvalidArgumentError: If the package is missing, or the source or split cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise InvalidArgumentError(
            "reading Hugging Face datasets needs the extra: pip install 'hyperlora[data]'"
        ) from error
    try:
        if is_saved_dataset(Path(source)):
            dataset = datasets.load_from_disk(source)
        else:
            dataset = datasets.load_dataset(source, split=split)
        if isinstance(dataset, Mapping):
            dataset = dataset[split]
    except (OSError, ValueError, KeyError) as error:
        raise InvalidArgumentError(
            f"{source!r}, split {split!r}, is neither a folder of {contents} nor a dataset "
            f"({format_reason(error)}): check the path or the id"
        ) from error
    return dataset
