"""Subjects in Hugging Face datasets and in WebDataset shards, listed or streamed.

``datasets`` reads both. It splits shards over ranks and loader processes, and needs no further
dependency.
"""

import logging
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hyperlora.data.captions import CAPTION_COLUMNS, parse_caption
from hyperlora.data.hub_dataset import load_hub_dataset
from hyperlora.data.image_formats import IMAGE_SUFFIXES
from hyperlora.data.photos import EncodedPhoto, RowPhoto, SubjectPhotos, get_cell_bytes
from hyperlora.data.subject_layouts import IDENTITY_COLUMNS
from hyperlora.data.subject_sources import (
    MAX_PHOTOS_PER_SUBJECT,
    SubjectSource,
    check_subject_sizes,
)
from hyperlora.errors import InvalidArgumentError, InvalidImageError, format_reason

if TYPE_CHECKING:
    from datasets import IterableDataset

IMAGE_COLUMNS: Final = (
    *("image", "img", "photo", "picture", "jpg", "jpeg", "png", "webp"),
    *sorted(suffix[1:] for suffix in IMAGE_SUFFIXES),
)
"""Usual names of the column of images; in a shard these are suffixes of files."""
_SHARD_IDENTITY_COLUMNS: Final = ("cls", "id")
_SHARD_CAPTION_COLUMNS: Final = ("txt",)
_READ_ERRORS: Final = (OSError, ValueError, KeyError, tarfile.TarError)
Columns = tuple[str | None, str | None, str | None]
"""Columns of images, identities and captions that the user names."""
StreamPosition = dict[str, Any] | None
"""Shard and row of a stream, as ``datasets`` notes them; None for the start."""


@dataclass(frozen=True)
class _ColumnNames:
    """Columns of a dataset; a path of two names is a field of a column of objects."""

    image: str
    identity: tuple[str, ...] | None
    caption: tuple[str, ...] | None


class HubSource(SubjectSource):
    """A Hugging Face dataset that is on the disk, or is fetched as a whole.

    Args:
        name: Hub id, folder of Parquet files, or folder of ``save_to_disk``.
        split: Split of the dataset.
        columns: Columns of images, identities and captions; None for the usual names.
        max_photos_per_subject: See ``check_subject_sizes``.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        columns: Columns = (None, None, None),
        max_photos_per_subject: int = MAX_PHOTOS_PER_SUBJECT,
    ) -> None:
        super().__init__(name)
        self.split, self.columns = split, columns
        self.max_photos_per_subject = max_photos_per_subject

    def list_subjects(self) -> list[SubjectPhotos]:
        """List the subjects in the order of their first rows."""
        import datasets

        rows = load_hub_dataset(self.name, self.split, "photos")
        names = _find_columns(rows.features, self.columns, self.name)
        self.layout_note = _describe_columns(names)
        identities, captions = (
            _read_column(rows, path) for path in (names.identity, names.caption)
        )
        encoded_rows = rows.cast_column(names.image, datasets.Image(decode=False))
        photos: dict[str, list[RowPhoto]] = {}
        for i in range(len(rows)):
            subject = str(identities[i]) if identities else f"row-{i:06d}"
            caption = parse_caption(captions[i]) if captions else None
            photo = RowPhoto(f"row-{i:06d}", caption, encoded_rows, names.image, i)
            photos.setdefault(subject, []).append(photo)
        if not photos:
            raise InvalidImageError(f"{self.name!r}, split {self.split!r}, is empty")
        subjects = [SubjectPhotos(name, tuple(entries)) for name, entries in photos.items()]
        check_subject_sizes(subjects, self.name, self.max_photos_per_subject)
        return subjects


class HubStream(SubjectSource):
    """A Hugging Face dataset or WebDataset shards, read as they come.

    Rows of one subject must follow one another. A shard's samples are named ``SUBJECT/PHOTO.jpg``,
    or have the subject as ``person_id`` in ``.json`` or in ``.cls``; captions stand in ``.txt``.

    Args:
        name: Hub id, folder of Parquet files, or what the user calls the shards.
        split: Split of the dataset.
        columns: Columns of images, identities and captions; None for the usual names.
        shards: ``.tar`` files; None for a dataset.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        columns: Columns = (None, None, None),
        shards: Sequence[str] | None = None,
    ) -> None:
        super().__init__(name)
        self.split, self.columns, self.shards = split, columns, shards
        self._opened: tuple[IterableDataset, _ColumnNames] | None = None

    @property
    def num_shards(self) -> int:
        """Number of files that ranks and loader processes share."""
        return int(self._open()[0].num_shards)

    def check_num_readers(self, num_readers: int) -> None:
        """Check that every rank and loader process has a shard.

        Args:
            num_readers: Ranks times loader processes.

        Raises:
            InvalidArgumentError: There are fewer shards.
        """
        if self.num_shards < num_readers:
            raise InvalidArgumentError(
                f"{self.name!r} has {self.num_shards} shards, {num_readers} are needed, one for "
                "each device times num_workers: lower num_workers, or write more shards"
            )

    def list_subjects(self) -> list[SubjectPhotos]:
        """Read all subjects into memory; for small streams, as those of validation."""
        subjects = list(self.iterate_subjects())
        if not subjects:
            raise InvalidImageError(f"{self.name!r} holds no photo")
        return subjects

    def iterate_subjects(
        self, rank: int = 0, num_ranks: int = 1, shuffle_seed: int | None = None
    ) -> Iterator[SubjectPhotos]:
        """Iterate over the subjects of one rank's shards, and of one loader process' among them.

        Args:
            rank: The rank.
            num_ranks: Number of ranks.
            shuffle_seed: Seed of the order of shards; None for their own order.

        Yields:
            The subjects.

        Raises:
            InvalidArgumentError: The photos of a subject do not follow one another.
        """
        for _, subject in self.iterate_positions(rank, num_ranks, shuffle_seed):
            yield subject

    def iterate_positions(
        self,
        rank: int = 0,
        num_ranks: int = 1,
        shuffle_seed: int | None = None,
        position: StreamPosition = None,
    ) -> "Iterator[tuple[StreamPosition, SubjectPhotos]]":
        """Iterate over subjects as ``iterate_subjects``, from any position on.

        Args:
            rank: The rank.
            num_ranks: Number of ranks.
            shuffle_seed: Seed of the order of shards; None for their own order.
            position: Where to begin; None for the start.

        Yields:
            The position of a subject, plain values of shards and rows, and the subject.

        Raises:
            InvalidArgumentError: The photos of a subject do not follow one another.
        """
        rows, names = self._open()
        if num_ranks > 1:
            rows = rows.shard(num_ranks, rank)
        if shuffle_seed is not None:
            # shards one after another, each in its order: rows of a subject stay together
            rows = rows.shuffle(seed=shuffle_seed, buffer_size=1, max_buffer_input_shards=1)
        if position is not None:
            # it warns that a shuffle buffer is lost, and this one never holds a row
            logging.getLogger("datasets.iterable_dataset").addFilter(_is_no_buffer_warning)
            rows.load_state_dict(position)
        previous_names: set[int] = set()
        num_returns = 0
        current_name, photos = None, list[EncodedPhoto]()
        for row_position, name, photo in self._iterate_photos(rows, names, position):
            if name != current_name and photos:
                yield position, SubjectPhotos(str(current_name), tuple(photos))
                previous_names.add(hash(current_name))
                photos, position = [], row_position
            num_returns += name != current_name and hash(name) in previous_names
            if num_returns > rows.num_shards:  # one may be cut at the end of each shard
                raise InvalidArgumentError(
                    f"{self.name!r}: the photos of {name!r} do not follow one another, as a "
                    "stream needs: sort it by subject, or set source.streaming to false"
                )
            current_name = name
            photos.append(photo)
        if photos:
            yield position, SubjectPhotos(str(current_name), tuple(photos))

    def _iterate_photos(
        self, rows: "IterableDataset", names: _ColumnNames, position: StreamPosition
    ) -> "Iterator[tuple[StreamPosition, str, EncodedPhoto]]":
        """Iterate over the position of a row, who is shown, and the photo."""
        try:
            for index, row in enumerate(rows):
                yield position, *_read_row(row, names, index)
                position = rows.state_dict()
        except _READ_ERRORS as error:
            raise InvalidArgumentError(
                f"{self.name!r} cannot be read to its end ({format_reason(error)}): "
                "fetch or write it again"
            ) from error

    def _open(self) -> "tuple[IterableDataset, _ColumnNames]":
        """Open the stream once, with images that are not decoded."""
        if self._opened is None:
            import datasets

            rows = self._load()
            if rows.features is None:  # known only after a first row
                rows = rows._resolve_features()
            is_shards = self.shards is not None
            names = _find_columns(rows.features, self.columns, self.name, is_shards)
            self.layout_note = _describe_columns(names, is_shards)
            self._opened = (rows.cast_column(names.image, datasets.Image(decode=False)), names)
        return self._opened

    def _load(self) -> "IterableDataset":
        try:
            import datasets
        except ImportError as error:
            raise InvalidArgumentError(
                "reading streams needs the extra: pip install 'hyperlora[data]'"
            ) from error
        try:
            if self.shards is not None:
                files = {"train": [str(shard) for shard in self.shards]}
                return datasets.load_dataset(
                    "webdataset", data_files=files, split="train", streaming=True
                )
            if Path(self.name).exists() and not any(Path(self.name).glob("**/*.parquet")):
                saved = load_hub_dataset(self.name, self.split, "photos")
                return saved.to_iterable_dataset(num_shards=max(1, min(64, len(saved))))
            return datasets.load_dataset(self.name, split=self.split, streaming=True)
        except _READ_ERRORS as error:
            raise InvalidArgumentError(
                f"{self.name!r} cannot be read as a stream of photos ({format_reason(error)}): "
                "check the path, and that all samples have the same parts"
            ) from error


def _is_no_buffer_warning(record: logging.LogRecord) -> bool:
    return "without the buffer content" not in record.getMessage()


def _read_row(row: dict[str, Any], names: _ColumnNames, index: int) -> tuple[str, EncodedPhoto]:
    """Read who is shown in a row, and the photo."""
    key = str(row.get("__key__", f"row-{index:06d}"))
    if names.identity:
        name = str(_get_field(row, names.identity))
    else:
        folder = key.rpartition("/")[0]
        name = folder or key
    caption = parse_caption(_get_field(row, names.caption)) if names.caption else None
    data = get_cell_bytes(row[names.image], key)
    return name, EncodedPhoto(key, caption, data)


def _find_columns(
    features: dict[str, Any], requested: Columns, source: str, is_shards: bool = False
) -> _ColumnNames:
    """Find the columns: the requested ones, else the usual names."""
    image, identity, caption = requested
    identity_columns = IDENTITY_COLUMNS + (_SHARD_IDENTITY_COLUMNS if is_shards else ())
    caption_columns = CAPTION_COLUMNS + (_SHARD_CAPTION_COLUMNS if is_shards else ())
    image_path = _find_path(features, image, IMAGE_COLUMNS, source, "image")
    if image_path is None:
        raise InvalidArgumentError(
            f"{source!r} has the columns {', '.join(features)}, none of which is known to hold "
            "images: name it as source.image_column"
        )
    return _ColumnNames(
        image_path[0],
        _find_path(features, identity, identity_columns, source, "identity"),
        _find_path(features, caption, caption_columns, source, "caption"),
    )


def _find_path(
    features: dict[str, Any],
    requested: str | None,
    candidates: Sequence[str],
    source: str,
    role: str,
) -> tuple[str, ...] | None:
    """Find a column, or a field of the objects of ``json``."""
    fields = features.get("json")
    nested = list(fields) if isinstance(fields, dict) else []
    if requested:
        if requested in features:
            return (requested,)
        if requested in nested:
            return ("json", requested)
        raise InvalidArgumentError(
            f"{source!r} has the columns {', '.join([*features, *nested])}, not {requested!r}: "
            f"correct source.{role}_column"
        )
    for name in candidates:
        if name in features:
            return (name,)
        if name in nested:
            return ("json", name)
    return None


def _read_column(rows: Any, path: tuple[str, ...] | None) -> list[Any] | None:  # noqa: ANN401
    """Read a column or the field of one; None if there is none."""
    if path is None:
        return None
    values = list(rows[path[0]])
    return values if len(path) == 1 else [value[path[1]] for value in values]


def _get_field(row: dict[str, Any], path: tuple[str, ...]) -> Any:  # noqa: ANN401 - any cell
    value: Any = row
    for name in path:
        value = value[name]
    return value


def _describe_columns(names: _ColumnNames, is_shards: bool = False) -> str:
    """Say which column tells who is shown."""
    if names.identity:
        return f"by the column {'.'.join(names.identity)}"
    if is_shards:
        return "by the folders of the samples' names"
    return "no column says who is shown: every row shows someone else"
