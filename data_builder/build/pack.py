"""Chunks into few large shards and one table."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data_builder.build.chunk_store import Chunks, require_whole
from data_builder.build.plan import read_plan
from hyperlora.data.lora_dataset import TABLE, write_table
from hyperlora.data.lora_shards import LoraRecord, open_shard, shard_bytes
from hyperlora.errors import BadRequest
from hyperlora.lora.io.safetensors_file import write_bytes
from hyperlora.progress import track


def pack(
    folder: Path,
    out: Path,
    *,
    rows_per_shard: int = 4096,
    partial: bool = False,
    scores: dict[tuple[str, int], float] | None = None,
    without: Collection[tuple[str, int]] = (),
) -> int:
    """Write ``out/loras-00000.safetensors``, ... and ``table.parquet`` (last) from the finished chunks of a build, in
    the plan's order; how many rows. ``scores`` fill the table's column, rows ``without`` are left out; both by
    (subject, view).

    Raises ``BadRequest`` for an unfinished build (unless ``partial``) or a folder that holds other shards.
    """
    chunks = Chunks(read_plan(folder), folder)
    require_whole(chunks, partial)
    if out.resolve() == (folder / "chunks").resolve():
        raise BadRequest(f"{str(out)!r} holds the chunks themselves: pack into another folder")
    for old in sorted(out.glob("loras-*.safetensors")):
        if open_shard(old).notes.get("hyperlora.plan") != chunks.plan.digest:
            raise BadRequest(f"{str(out)!r} holds the LoRAs of another plan: pack into another folder")
        old.unlink()
    (out / TABLE).unlink(missing_ok=True)
    layout = chunks.open(chunks.done()[0]).layout
    records: list[LoraRecord] = []
    for i, (rows, table) in enumerate(_joined(chunks, rows_per_shard, scores or {}, without)):
        data = shard_bytes(rows, layout, (), {"hyperlora.plan": chunks.plan.digest})
        write_bytes(data, out / f"loras-{i:05d}.safetensors")
        records += table
    write_bytes((folder / "plan.json").read_bytes(), out / "plan.json")
    places = [divmod(i, rows_per_shard) for i in range(len(records))]
    write_table(records, out / TABLE, shard=[s for s, _ in places], row=[r for _, r in places])
    return len(records)


def _joined(
    chunks: Chunks, most: int, scores: dict[tuple[str, int], float], without: Collection[tuple[str, int]]
) -> Iterator[tuple[Tensor, list[LoraRecord]]]:
    rows: list[Tensor] = []
    table: list[LoraRecord] = []
    for number in track(chunks.done(), "packing", "chunks", len(chunks.done())):
        shard = chunks.open(number)
        for row, record in zip(shard.rows, shard.table, strict=True):
            key = (record.subject, record.view)
            if key in without:
                continue
            rows.append(row)
            table.append(replace(record, score=scores.get(key, record.score)))
            if len(rows) == most:
                yield torch.stack(rows), table
                rows, table = [], []
    if rows:
        yield torch.stack(rows), table
