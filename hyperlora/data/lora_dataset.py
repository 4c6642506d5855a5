"""``LoraDataset``: many LoRAs of one layout, mapped from shards, in random access."""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hyperlora.data.lora_shards import LoraRecord, Shard, open_shard
from hyperlora.errors import InvalidLoraFileError
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.normalization import LoraNormalizer
from hyperlora.lora.weights import LoraWeights

TABLE_NAME: Final = "table.parquet"
"""The table of a packed dataset, with one record per row."""
_FLOAT_COLUMNS: Final = ("loss", "initial_loss", "best_loss", "score")
_INT_COLUMNS: Final = ("repetition", "seed", "num_steps")


class LoraDataset(Dataset[Tensor]):
    """Flat LoRAs [P] of one layout in a folder of shards; rows stay on disk until they are read.

    Args:
        folder: A folder of shards (``*.safetensors``), with ``table.parquet`` where they are
            packed; or the folder of a build, whose ``chunks`` are read.
        split: Only rows of this split count; None for all.

    Attributes:
        records: What each row is.

    Raises:
        InvalidLoraFileError: There is no shard, or a table of other shards.
        LayoutMismatchError: The shards have different layouts.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str | None = None) -> None:
        self.folder = _resolve_shard_dir(Path(folder))
        shard_paths = sorted(self.folder.glob("[!.]*.safetensors")) if self.folder.is_dir() else []
        if not shard_paths:
            raise InvalidLoraFileError(
                f"{str(folder)!r} holds no shard of a LoRA dataset: "
                "name the folder of a build or a pack"
            )
        self.shards = [open_shard(path) for path in shard_paths]
        for shard in self.shards:
            if shard.layout != self.shards[0].layout:
                self.shards[0].layout.check_compatible(shard.layout)
        self._shard_ends = list(accumulate(len(shard.rows) for shard in self.shards))
        records = _load_records(self.folder, self.shards)
        if len(records) != self._shard_ends[-1]:
            raise InvalidLoraFileError(
                f"{TABLE_NAME} in {str(self.folder)!r} lists {len(records)} rows, the shards hold "
                f"{self._shard_ends[-1]}: pack the build again"
            )
        self._row_indices = [i for i, r in enumerate(records) if split is None or r.split == split]
        self.records = [records[i] for i in self._row_indices]

    @property
    def layout(self) -> LoraLayout:
        """The layout of the LoRAs."""
        return self.shards[0].layout

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._row_indices)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Tensor:
        """Read a row, or several rows.

        Args:
            index: A number; or a slice, a sequence of numbers or a tensor of them.

        Returns:
            [P], or [n, P], in the dtype of the shards.

        Raises:
            IndexError: There is no such row.
        """
        if isinstance(index, int):
            return self._read_row(index).clone()  # changes to the row stay out of the mapped pages
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        row_numbers = index.tolist() if isinstance(index, Tensor) else index
        rows = torch.empty(len(row_numbers), self.layout.numel, dtype=self.shards[0].rows.dtype)
        for position, i in enumerate(row_numbers):
            rows[position] = self._read_row(i)
        return rows

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """Read a batch, as torch's ``DataLoader`` requests it: rows [P] of the given numbers."""
        return list(self[indices])

    def get_weights(self, index: int | Sequence[int]) -> LoraWeights:
        """Read one LoRA, or a batch of them, as float32 weights."""
        rows = self[index]
        return LoraWeights.unflatten(self.layout, rows.float())

    def list_subject_rows(self, subject: str) -> list[int]:
        """Return the rows of one subject; empty if it has none."""
        return self._rows_by_subject.get(subject, [])

    @property
    def subjects(self) -> list[str]:
        """The names of all subjects, in the order of their first rows."""
        return list(self._rows_by_subject)

    def iter_batches(self, batch_size: int = 256) -> Iterator[Tensor]:
        """Read all rows in order, as batches [batch_size, P]; the last may be smaller."""
        for start_index in range(0, len(self), batch_size):
            yield self[start_index : start_index + batch_size]

    def fit_normalizer(self, canonical: bool = False, per_factor: bool = False) -> LoraNormalizer:
        """Fit the mean and the standard deviation of every number over the rows.

        Args:
            canonical: Whether the factors are brought to a canonical form first.
            per_factor: Whether the numbers of a factor share a standard deviation.

        Returns:
            The normalizer.
        """
        return LoraNormalizer.fit(self.layout, self.iter_batches(), canonical, per_factor)

    @cached_property
    def _rows_by_subject(self) -> dict[str, list[int]]:
        rows_by_subject: dict[str, list[int]] = {}
        for i, record in enumerate(self.records):
            rows_by_subject.setdefault(record.subject, []).append(i)
        return rows_by_subject

    def _read_row(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row_index = self._row_indices[index]
        shard_index = bisect_right(self._shard_ends, row_index)
        # the offset from the shard's end is negative and counts from its last row
        return self.shards[shard_index].rows[row_index - self._shard_ends[shard_index]]


def write_table(records: Iterable[LoraRecord], path: Path, **extra_columns: Sequence[int]) -> None:
    """Write a Parquet table of records, whole or not at all. Undone by ``read_table``.

    Args:
        records: One per row.
        path: The file.
        **extra_columns: Further columns of integers, by name.
    """
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    from hyperlora.lora.io.safetensors_file import write_bytes

    rows: list[dict[str, Any]] = [
        {**record.to_dict(), **{name: column[i] for name, column in extra_columns.items()}}
        for i, record in enumerate(records)
    ]
    schema = pa.schema(
        [
            ("subject", pa.string()),
            ("split", pa.string()),
            ("reference_sha256", pa.list_(pa.string())),
        ]
        + [(name, pa.int64()) for name in (*_INT_COLUMNS, *extra_columns)]
        + [(name, pa.float64()) for name in _FLOAT_COLUMNS]
    )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer)
    write_bytes(buffer.getvalue(), path)


def read_table(path: Path) -> list[LoraRecord]:
    """Read the records of a Parquet table.

    Args:
        path: The file.

    Returns:
        One record per row.

    Raises:
        InvalidLoraFileError: The file is no such table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return [LoraRecord.from_dict(row) for row in pq.read_table(path).to_pylist()]
    except (pa.ArrowException, OSError, TypeError) as error:
        raise InvalidLoraFileError(
            f"{path.name} is no table of a LoRA dataset: pack the build again"
        ) from error


def _resolve_shard_dir(folder: Path) -> Path:
    return folder / "chunks" if (folder / "chunks").is_dir() else folder


def _load_records(folder: Path, shards: Sequence[Shard]) -> list[LoraRecord]:
    """Load the records of the table, or of the shards where there is none."""
    if (folder / TABLE_NAME).is_file():
        return read_table(folder / TABLE_NAME)
    return [record for shard in shards for record in shard.records]
