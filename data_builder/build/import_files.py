"""A LoRA dataset from a folder of ordinary LoRA files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hyperlora.data.lora_dataset import TABLE_NAME, write_table
from hyperlora.data.lora_shards import LoraRecord, serialize_shard
from hyperlora.errors import HyperloraError, InvalidArgumentError
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.safetensors_file import write_bytes
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.merge import compute_relative_error
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track


@dataclass(frozen=True)
class ImportReport:
    """``errors`` files and ``warnings`` on others (such as a rank that was cut), a sentence each."""

    num_loras: int
    errors: tuple[str, ...]
    warnings: tuple[str, ...]


def list_lora_files(folder: Path) -> list[Path]:
    """Sorted, also those of sub-folders. Raises ``InvalidArgumentError`` if there is none."""
    paths = sorted(f for f in folder.rglob("*.safetensors") if not f.name.startswith("."))
    if not paths:
        raise InvalidArgumentError(
            f"{str(folder)!r} holds no LoRA file (.safetensors): name the folder they are in"
        )
    return paths


def infer_layout(folder: Path, modules: Mapping[str, nn.Module], base: str) -> LoraLayout:
    """The layout of the first file that fits the live base. Raises ``InvalidArgumentError`` if none does."""
    errors = []
    for path in list_lora_files(folder):
        try:
            layout = load_lora(path, modules=modules).weights.layout
            return LoraLayout(layout.targets, layout.rank, base)
        except HyperloraError as error:
            errors.append(str(error))
    raise InvalidArgumentError(f"no LoRA file in {str(folder)!r} is for base {base!r}: {errors[0]}")


def import_lora_files(
    folder: Path, output_dir: Path, layout: LoraLayout, rows_per_shard: int = 4096
) -> ImportReport:
    """Write ``output_dir/loras-00000.safetensors``, ... and ``table.parquet`` (last) of every file that has exactly the sites
    of ``layout``; other ranks are brought to its rank by SVD. Subjects are the files' names.

    Raises ``InvalidArgumentError`` if no file fits, or ``output_dir`` holds a dataset already.
    """
    if (output_dir / TABLE_NAME).exists() or any(
        not f.name.startswith("loras-") for f in output_dir.glob("*.safetensors")
    ):
        raise InvalidArgumentError(
            f"{str(output_dir)!r} holds LoRAs already: collect into another folder"
        )
    for partial_shard in output_dir.glob(
        "loras-*.safetensors"
    ):  # of a run that was killed before its table
        partial_shard.unlink()
    rows, records, errors, warnings, num_shards = (
        list[Tensor](),
        list[LoraRecord](),
        list[str](),
        list[str](),
        0,
    )
    paths = list_lora_files(folder)
    for path in track(paths, "collecting", "files", len(paths)):
        name = path.relative_to(folder).with_suffix("").as_posix()
        try:
            lora_file = load_lora(path, layout=layout)
            weights, truncation_error = _resize_to_rank(lora_file.weights, layout.rank)
        except HyperloraError as error:
            errors.append(f"refused: {name}: {error}")
            continue
        if truncation_error > 1e-4:
            warnings.append(
                f"note: {name}: rank {lora_file.weights.layout.rank} cut to {layout.rank}, {truncation_error:.1%} lost"
            )
        rows.append(weights.flatten())
        records.append(LoraRecord(name, reference_sha256=lora_file.metadata.reference_sha256))
        if len(rows) == rows_per_shard:
            num_shards, rows = _write_shard(output_dir, num_shards, rows, layout), []
    if rows:
        num_shards = _write_shard(output_dir, num_shards, rows, layout)
    if not num_shards:
        raise InvalidArgumentError(f"none of the {len(paths)} files fits: {errors[0]}")
    write_table(records, output_dir / TABLE_NAME)
    return ImportReport(len(records), tuple(errors), tuple(warnings))


def _resize_to_rank(weights: LoraWeights, rank: int) -> tuple[LoraWeights, float]:
    """The LoRA at another rank, and how much of ΔW that loses (relative)."""
    if weights.layout.rank == rank:
        return weights, 0.0
    resized = weights.resize(rank)
    return resized, compute_relative_error(resized, weights)


def _write_shard(output_dir: Path, shard_index: int, rows: list[Tensor], layout: LoraLayout) -> int:
    write_bytes(
        serialize_shard(torch.stack(rows), layout, ()),
        output_dir / f"loras-{shard_index:05d}.safetensors",
    )
    return shard_index + 1
