"""LoRAs read per second from shards, at random and in order, against one file per LoRA, in one run.

    python benchmarks/reading.py [--rows 2000] [--numbers 82000] [--batch 64] [--reads 20000]

Rows are random fp16 numbers of an attention LoRA's size. The page cache is warm, as in every epoch after the first.
Rates are per second and per second of this process on a core, which is what counts on a machine that others use too.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hyperlora.data.lora_dataset import LoraDataset, write_table
from hyperlora.data.lora_shards import LoraRecord, serialize_shard
from hyperlora.lora.io.safetensors_file import write_bytes
from hyperlora.lora.layout import LoraLayout, TargetModule


def write_shards(folder: Path, rows: int, num_parameters: int, per_shard: int = 512) -> LoraDataset:
    """A packed dataset of random rows."""
    targets = tuple(
        TargetModule(f"unet.layer{i}", 320, 320) for i in range(max(1, num_parameters // 1280))
    )
    layout = LoraLayout(targets, 2, "random")
    for i, first in enumerate(range(0, rows, per_shard)):
        block = torch.randn(min(per_shard, rows - first), layout.numel).half()
        write_bytes(serialize_shard(block, layout, ()), folder / f"loras-{i:05d}.safetensors")
    write_table([LoraRecord(f"subject-{i}") for i in range(rows)], folder / "table.parquet")
    return LoraDataset(folder)


def measure_rates(
    read: Callable[[list[int]], object], rows: int, batch_size: int, num_reads: int, in_order: bool
) -> str:
    """LoRAs per second, by the clock and by this process's time."""
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    for first in range(0, num_reads, batch_size):
        read(
            [(first + i) % rows for i in range(batch_size)]
            if in_order
            else torch.randint(rows, (batch_size,)).tolist()
        )
    wall_time_s, cpu_time_s = time.perf_counter() - wall_start, time.process_time() - cpu_start
    return f"{num_reads / wall_time_s:,.0f} LoRAs/s, {num_reads / cpu_time_s:,.0f} per second on a core"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--numbers", type=int, default=82_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--reads", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, n = Path(name), arguments.rows
        data = write_shards(folder / "shards", n, arguments.numbers)
        print(f"{n} LoRAs of {data.layout.numel:,} fp16 numbers")
        for kind, in_order in (("random", False), ("in order", True)):
            print(
                f"shards, {kind}: {measure_rates(lambda i: data[i], n, arguments.batch, arguments.reads, in_order)}"
            )
        num_files = min(n, 256)
        for i in range(num_files):
            weights = data.get_weights(i)
            pairs = zip(data.layout.targets, weights.down, weights.up, strict=True)
            tensors = {
                f"{s.name}.{k}": t.half().contiguous()
                for s, d, u in pairs
                for k, t in (("down", d), ("up", u))
            }
            save_file(tensors, folder / f"{i}.safetensors")
        files = measure_rates(
            lambda chosen: [load_file(folder / f"{i}.safetensors") for i in chosen],
            num_files,
            arguments.batch,
            arguments.reads // 20,
            False,
        )
        print(f"one file per LoRA, random: {files}")


if __name__ == "__main__":
    main()
