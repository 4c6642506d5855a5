"""Chunks into few large shards and one table."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data_builder.build.chunk_store import ChunkStore, check_complete
from data_builder.build.plan import read_plan
from hyperlora.data.lora_dataset import TABLE_NAME, write_table
from hyperlora.data.lora_shards import LoraRecord, open_shard, serialize_shard
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.safetensors_file import write_bytes
from hyperlora.progress import track


def pack_chunks(
    folder: Path,
    output_dir: Path,
    *,
    rows_per_shard: int = 4096,
    partial: bool = False,
    scores: dict[tuple[str, int], float] | None = None,
    excluded: Collection[tuple[str, int]] = (),
) -> int:
    """Write ``output_dir/loras-00000.safetensors``, ... and ``table.parquet`` (last) from the finished chunks of a build, in
    the plan's order; how many rows. ``scores`` fill the table's column, rows ``excluded`` are left out; both by
    (subject, view).

    Raises ``InvalidArgumentError`` for an unfinished build (unless ``partial``) or a folder that holds other shards.
    """
    store = ChunkStore(read_plan(folder), folder)
    check_complete(store, partial)
    if output_dir.resolve() == (folder / "chunks").resolve():
        raise InvalidArgumentError(
            f"{str(output_dir)!r} holds the chunks themselves: pack into another folder"
        )
    for stale_shard in sorted(output_dir.glob("loras-*.safetensors")):
        if open_shard(stale_shard).metadata.get("hyperlora.plan") != store.plan.fingerprint:
            raise InvalidArgumentError(
                f"{str(output_dir)!r} holds the LoRAs of another plan: pack into another folder"
            )
        stale_shard.unlink()
    (output_dir / TABLE_NAME).unlink(missing_ok=True)
    layout = store.open_chunk(store.list_finished_chunks()[0]).layout
    records: list[LoraRecord] = []
    for i, (rows, shard_records) in enumerate(
        _split_into_shards(store, rows_per_shard, scores or {}, excluded)
    ):
        data = serialize_shard(rows, layout, (), {"hyperlora.plan": store.plan.fingerprint})
        write_bytes(data, output_dir / f"loras-{i:05d}.safetensors")
        records += shard_records
    write_bytes((folder / "plan.json").read_bytes(), output_dir / "plan.json")
    positions = [divmod(i, rows_per_shard) for i in range(len(records))]
    write_table(
        records,
        output_dir / TABLE_NAME,
        shard=[s for s, _ in positions],
        row=[r for _, r in positions],
    )
    return len(records)


def _split_into_shards(
    store: ChunkStore,
    rows_per_shard: int,
    scores: dict[tuple[str, int], float],
    excluded: Collection[tuple[str, int]],
) -> Iterator[tuple[Tensor, list[LoraRecord]]]:
    rows: list[Tensor] = []
    records: list[LoraRecord] = []
    for number in track(
        store.list_finished_chunks(), "packing", "chunks", len(store.list_finished_chunks())
    ):
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
