"""``LoraDataset``: many LoRAs of one layout, mapped from shards, read at random."""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hyperlora.data.lora_shards import LoraRecord, Shard, open_shard
from hyperlora.errors import InvalidLoraFileError
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.normalization import LoraNormalizer
from hyperlora.lora.weights import LoraWeights

TABLE_NAME: Final = "table.parquet"


class LoraDataset(Sequence[Tensor]):
    """Rows [P] of numbers as they were fitted, each a LoRA of ``layout``; ``records`` says what each is.

    ``folder`` holds shards (``*.safetensors``) and, where they were packed, ``table.parquet``; a build's own folder is
    read through its ``chunks``. Rows stay on disk until they are asked for. With ``split``, only its rows count.

    Raises ``InvalidLoraFileError`` for a folder without shards, shards of different layouts, or a table of other shards.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str | None = None) -> None:
        self.folder = _resolve_shard_dir(Path(folder))
        shard_paths = sorted(self.folder.glob("[!.]*.safetensors")) if self.folder.is_dir() else []
        if not shard_paths:
            raise InvalidLoraFileError(
                f"{str(folder)!r} holds no shard of a LoRA dataset: name the folder of a build or a pack"
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
        return self.shards[0].layout

    def __len__(self) -> int:
        return len(self._row_indices)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """Row [P] of a number, rows [n, P] of a slice or of many numbers, in the dtype of the shards."""
        if isinstance(index, int):
            return self._read_row(index).clone()  # what is done to it stays out of the mapped pages
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        if isinstance(index, Tensor):
            index = index.tolist()
        rows = torch.empty(len(index), self.layout.numel, dtype=self.shards[0].rows.dtype)
        for position, i in enumerate(index):
            rows[position] = self._read_row(i)
        return rows

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """A batch at once, as torch's ``DataLoader`` asks for it."""
        return list(self[indices])

    def get_weights(self, index: int | Sequence[int]) -> LoraWeights:
        """One LoRA, or a batch of them, as float32 weights."""
        rows: Tensor = self[index]
        return LoraWeights.unflatten(self.layout, rows.float())

    def list_subject_rows(self, subject: str) -> list[int]:
        """The rows of one subject; empty if it has none."""
        return self._rows_by_subject.get(subject, [])

    @property
    def subjects(self) -> list[str]:
        return list(self._rows_by_subject)

    def iter_batches(self, batch_size: int = 256) -> Iterator[Tensor]:
        """All rows in order, [size, P] at a time (the last perhaps fewer)."""
        for start_index in range(0, len(self), batch_size):
            yield self[start_index : start_index + batch_size]

    def fit_normalizer(self, canonical: bool = False) -> LoraNormalizer:
        """The z-score of these rows."""
        return LoraNormalizer.fit(self.layout, self.iter_batches(), canonical)

    @property
    def _rows_by_subject(self) -> dict[str, list[int]]:
        if not hasattr(self, "_views"):
            self._cached_rows_by_subject: dict[str, list[int]] = {}
            for i, record in enumerate(self.records):
                self._cached_rows_by_subject.setdefault(record.subject, []).append(i)
        return self._cached_rows_by_subject

    def _read_row(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row_index = self._row_indices[index]
        shard_index = bisect_right(self._shard_ends, row_index)
        return self.shards[shard_index].rows[
            row_index - self._shard_ends[shard_index]
        ]  # counted from the shard's end, which is known


def write_table(records: Iterable[LoraRecord], path: Path, **extra_columns: Sequence[int]) -> None:
    """A Parquet table of records (and further ``extra_columns``), whole or not at all."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    from hyperlora.lora.io.safetensors_file import write_bytes

    rows = [
        {**record.to_dict(), **{k: v[i] for k, v in extra_columns.items()}}
        for i, record in enumerate(records)
    ]
    float_columns, int_columns = (
        ("loss", "before", "after", "score"),
        ("view", "seed", "steps", *extra_columns),
    )
    schema = pa.schema(
        [("subject", pa.string()), ("split", pa.string()), ("images", pa.list_(pa.string()))]
        + [(name, pa.int64()) for name in int_columns]
        + [(name, pa.float64()) for name in float_columns]
    )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer)
    write_bytes(buffer.getvalue(), path)


def read_table(path: Path) -> list[LoraRecord]:
    """Inverse of ``write_table``. Raises ``InvalidLoraFileError`` if it is no such table."""
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
    if (folder / TABLE_NAME).is_file():
        return read_table(folder / TABLE_NAME)
    return [record for shard in shards for record in shard.records]
