"""Packing: few large shards and one table from the chunks of a build."""

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data_builder.build.chunk_store import ChunkStore, check_complete
from data_builder.build.plan import PLAN_FILE, PLAN_KEY, read_plan
from hyperlora.data.lora_dataset import TABLE_NAME, write_table
from hyperlora.data.lora_shards import LoraRecord, check_digest, open_shard, serialize_shard
from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError
from hyperlora.lora.io.safetensors_file import is_finite, write_bytes
from hyperlora.lora.layout import LoraLayout
from hyperlora.progress import track

RowKey = tuple[str, int]
"""Subject and repetition of a row."""


def pack_chunks(
    folder: Path,
    output_dir: Path,
    *,
    rows_per_shard: int = 4096,
    partial: bool = False,
    scores: Mapping[RowKey, float] | None = None,
    excluded: Collection[RowKey] = (),
    allow_non_finite: bool = False,
) -> int:
    """Write ``loras-00000.safetensors``, ... and, last, ``table.parquet`` from the finished chunks,
    in plan order.

    Args:
        folder: Folder of the build.
        output_dir: Folder to write.
        rows_per_shard: LoRAs in each shard.
        partial: Whether pending chunks are allowed.
        scores: Scores of rows for the table.
        excluded: Rows to leave out.
        allow_non_finite: Whether rows with NaN or infinity are written too.

    Returns:
        Number of rows written.

    Raises:
        InvalidArgumentError: If chunks are pending (unless ``partial``) or ``output_dir`` holds
            other shards.
        InvalidLoraFileError: If a chunk is damaged, or a row is not finite.
    """
    store = ChunkStore(read_plan(folder), folder)
    check_complete(store, partial)
    if os.path.realpath(output_dir) == os.path.realpath(folder / "chunks"):
        raise InvalidArgumentError(
            f"{str(output_dir)!r} holds the chunks themselves: pack into another folder"
        )
    layout = _check_rows(store, excluded, allow_non_finite)
    for stale_shard in sorted(output_dir.glob("loras-*.safetensors")):
        if open_shard(stale_shard).metadata.get(PLAN_KEY) != store.plan.fingerprint:
            raise InvalidArgumentError(
                f"{str(output_dir)!r} holds the LoRAs of another plan: pack into another folder"
            )
        stale_shard.unlink()
    (output_dir / TABLE_NAME).unlink(missing_ok=True)
    records: list[LoraRecord] = []
    shards = _split_into_shards(store, rows_per_shard, scores or {}, excluded)
    for i, (rows, shard_records) in enumerate(shards):
        data = serialize_shard(rows, layout, (), {PLAN_KEY: store.plan.fingerprint})
        write_bytes(data, output_dir / f"loras-{i:05d}.safetensors")
        records += shard_records
    write_bytes((folder / PLAN_FILE).read_bytes(), output_dir / PLAN_FILE)
    positions = [divmod(i, rows_per_shard) for i in range(len(records))]
    write_table(
        records,
        output_dir / TABLE_NAME,
        shard=[shard for shard, _ in positions],
        row=[row for _, row in positions],
    )
    return len(records)


def _check_rows(
    store: ChunkStore, excluded: Collection[RowKey], allow_non_finite: bool
) -> LoraLayout:
    """Check the rows of all finished chunks before anything is written; return their layout."""
    finished = store.list_finished_chunks()
    for number in track(finished, "checking", "chunks", len(finished)):
        shard = store.open_chunk(number)
        check_digest(shard)
        for row, record in zip(shard.rows, shard.records, strict=True):
            is_left_out = (record.subject, record.repetition) in excluded
            if not (allow_non_finite or is_left_out or is_finite(row)):
                raise InvalidLoraFileError(
                    f"the LoRA of {record.subject!r} in chunk {number} holds NaN or infinity, "
                    "numbers expected: audit the build, and pack leaves it out"
                )
    return shard.layout


def _split_into_shards(
    store: ChunkStore,
    rows_per_shard: int,
    scores: Mapping[RowKey, float],
    excluded: Collection[RowKey],
) -> Iterator[tuple[Tensor, list[LoraRecord]]]:
    """Yield the rows [rows, P] and records of each shard."""
    rows: list[Tensor] = []
    records: list[LoraRecord] = []
    finished = store.list_finished_chunks()
    for number in track(finished, "packing", "chunks", len(finished)):
        shard = store.open_chunk(number)
        for row, record in zip(shard.rows, shard.records, strict=True):
            key = (record.subject, record.repetition)
            if key in excluded:
                continue
            rows.append(row)
            records.append(replace(record, score=scores.get(key, record.score)))
            if len(rows) == rows_per_shard:
                yield torch.stack(rows), records
                rows, records = [], []
    if rows:
        yield torch.stack(rows), records
