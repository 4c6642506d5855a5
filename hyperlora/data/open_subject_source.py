"""Open the source that a user names: a folder, a dataset or shards, by what is there."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hyperlora.data.hub_dataset import is_saved_dataset
from hyperlora.data.hub_subjects import HubSource, HubStream
from hyperlora.data.subject_layouts import SubjectLayout
from hyperlora.data.subject_sources import MAX_PHOTOS_PER_SUBJECT, FolderSource, SubjectSource
from hyperlora.errors import InvalidArgumentError
from hyperlora.paths import find_path

_SHARD_SUFFIX: Final = ".tar"


@dataclass(frozen=True)
class SubjectSourceConfig:
    """How a source is read.

    Attributes:
        layout: Layout of a folder, ``folders``, ``strangers``, ``identity_file`` or ``metadata``;
            None to recognize it.
        split: Split of a dataset for training.
        validation_split: Split of a dataset for validation.
        image_column: Column of images of a dataset or of shards; None for the usual names. So for
            the next two.
        identity_column: Column that says who is shown.
        caption_column: Column of captions.
        streaming: Whether a dataset is read while it is fetched. Shards always are.
        max_photos_per_subject: Photos of a subject, beyond which it is suspected to be many people
            and refused.
    """

    layout: SubjectLayout | None = None
    split: str = "train"
    validation_split: str = "validation"
    image_column: str | None = None
    identity_column: str | None = None
    caption_column: str | None = None
    streaming: bool = False
    max_photos_per_subject: int = MAX_PHOTOS_PER_SUBJECT


def open_subject_source(
    name: str, config: SubjectSourceConfig | None = None, training: bool = True
) -> SubjectSource:
    """Open a folder, a Hugging Face dataset or WebDataset shards.

    Args:
        name: Folder of photos; folder or hub id of a dataset; ``.tar`` file, pattern of such
            files, or folder of them.
        config: How to read it; None for the defaults.
        training: Whether the split for training is read, not that for validation.

    Returns:
        The source; nothing is read yet.

    Raises:
        InvalidArgumentError: The path does not exist and can be no hub id.
    """
    config = config or SubjectSourceConfig()
    split = config.split if training else config.validation_split
    columns = (config.image_column, config.identity_column, config.caption_column)
    if shards := list_shards(name):
        return HubStream(name, split, columns, shards)
    folder = find_path(Path(name))
    is_dataset = is_saved_dataset(folder) or next(folder.glob("**/*.parquet"), None) is not None
    if folder.exists() and not is_dataset:
        return FolderSource(str(folder), config.layout, config.max_photos_per_subject)
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not _is_folder(folder.parent)
    if not folder.exists() and not is_hub_id:
        raise InvalidArgumentError(f"there is no folder {name!r}: check the path")
    if config.streaming:
        return HubStream(name, split, columns)
    return HubSource(name, split, columns, config.max_photos_per_subject)


def _is_folder(path: Path) -> bool:
    """Whether a folder other than the working directory exists."""
    return path != Path() and path.is_dir()


def list_shards(name: str) -> list[str]:
    """List WebDataset shards.

    Args:
        name: A ``.tar`` file, a pattern with ``*``, ``?`` or ``[...]``, or a folder of shards.

    Returns:
        The files, sorted; empty if these are no shards.

    Raises:
        InvalidArgumentError: A pattern matches nothing.
    """
    path = Path(name)
    if path.is_dir():
        return [str(p) for p in sorted(path.glob(f"*{_SHARD_SUFFIX}"))]
    if not name.endswith(_SHARD_SUFFIX):
        return []
    if "://" in name:  # read by fsspec, one file each
        return [name]
    paths = [path] if path.is_file() else sorted(Path(path.anchor).glob(_drop_anchor(path)))
    if not paths:
        raise InvalidArgumentError(f"no shard matches {name!r}: check the path")
    return [str(p) for p in paths]


def _drop_anchor(path: Path) -> str:
    return str(path.relative_to(path.anchor)) if path.anchor else str(path)
