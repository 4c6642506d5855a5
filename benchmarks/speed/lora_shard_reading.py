"""LoRAs read per second from shards, at random and in order, against one file per LoRA.

    python -m benchmarks.speed.lora_shard_reading [--num-loras 2000] [--num-parameters 82000]
        [--batch-size 64] [--num-reads 20000]

Rows are random fp16 numbers of an attention LoRA's size. The page cache is warm, as in every epoch
after the first. Rates are per second, and per second of processor time, which counts on a shared
machine.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperlora.data.lora_dataset import TABLE_NAME, LoraDataset, write_table
from hyperlora.data.lora_shards import LoraRecord, serialize_shard
from hyperlora.lora.io.safetensors_file import write_bytes
from hyperlora.lora.layout import LoraLayout, TargetModule


def write_shards(
    folder: Path, num_loras: int, num_parameters: int, rows_per_shard: int = 512
) -> LoraDataset:
    """Write a packed dataset of random LoRAs.

    Args:
        folder: Folder to write.
        num_loras: Number of LoRAs.
        num_parameters: Parameters of each LoRA, rounded to whole layers.
        rows_per_shard: LoRAs in each shard.

    Returns:
        The dataset.
    """
    targets = tuple(
        TargetModule(f"unet.layer{i}", 320, 320) for i in range(max(1, num_parameters // 1280))
    )
    layout = LoraLayout(targets, 2, "random")
    for i, start in enumerate(range(0, num_loras, rows_per_shard)):
        rows = torch.randn(min(rows_per_shard, num_loras - start), layout.numel).half()
        write_bytes(serialize_shard(rows, layout, ()), folder / f"loras-{i:05d}.safetensors")
    write_table([LoraRecord(f"subject-{i}") for i in range(num_loras)], folder / TABLE_NAME)
    return LoraDataset(folder)


def measure_rates(
    read_fn: Callable[[list[int]], object],
    num_loras: int,
    batch_size: int,
    num_reads: int,
    in_order: bool,
) -> str:
    """Measure the LoRAs per second, by the clock and by the time of this process.

    Args:
        read_fn: Reads the LoRAs at some indices.
        num_loras: Number of LoRAs to read from.
        batch_size: LoRAs per read.
        num_reads: Number of LoRAs to read.
        in_order: Whether to read in order, or else at random.

    Returns:
        Both rates as text.
    """
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    for start in range(0, num_reads, batch_size):
        indices = torch.randint(num_loras, (batch_size,)).tolist()
        if in_order:
            indices = [(start + i) % num_loras for i in range(batch_size)]
        read_fn(indices)
    wall_time_s, cpu_time_s = time.perf_counter() - wall_start, time.process_time() - cpu_start
    return (
        f"{num_reads / wall_time_s:,.0f} LoRAs/s, "
        f"{num_reads / cpu_time_s:,.0f} per second of processor time"
    )


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-loras", type=int, default=2000)
    parser.add_argument("--num-parameters", type=int, default=82_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-reads", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, num_loras = Path(name), arguments.num_loras
        batch_size, num_reads = arguments.batch_size, arguments.num_reads
        data = write_shards(folder / "shards", num_loras, arguments.num_parameters)
        print(f"{num_loras} LoRAs of {data.layout.numel:,} fp16 numbers")
        for order, in_order in (("random", False), ("in order", True)):
            rates = measure_rates(data.__getitem__, num_loras, batch_size, num_reads, in_order)
            print(f"shards, {order}: {rates}")
        num_files = min(num_loras, 256)
        for i in range(num_files):
            weights = data.get_weights(i)
            tensors = {}
            for target, down, up in zip(data.layout.targets, weights.down, weights.up, strict=True):
                tensors[f"{target.name}.down"] = down.half().contiguous()
                tensors[f"{target.name}.up"] = up.half().contiguous()
            save_file(tensors, folder / f"{i}.safetensors")

        def read_files(indices: list[int]) -> list[dict[str, Tensor]]:
            return [load_file(folder / f"{i}.safetensors") for i in indices]

        rates = measure_rates(read_files, num_files, batch_size, num_reads // 20, False)
        print(f"one file per LoRA, random: {rates}")


if __name__ == "__main__":
    main()
