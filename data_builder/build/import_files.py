"""LoRA datasets from folders of ordinary LoRA files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hyperlora.data.lora_dataset import TABLE_NAME, write_table
from hyperlora.data.lora_shards import LoraRecord, serialize_shard
from hyperlora.errors import HyperloraError, InvalidArgumentError
from hyperlora.lora.io import find
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.safetensors_file import write_bytes
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.merge import compute_relative_error
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track


@dataclass(frozen=True)
class ImportReport:
    """Result of an import.

    Attributes:
        num_loras: LoRAs in the dataset.
        errors: A sentence for each file that was refused.
        warnings: A sentence for each file that lost something, such as rank.
    """

    num_loras: int
    errors: tuple[str, ...]
    warnings: tuple[str, ...]


def list_lora_files(folder: Path) -> list[Path]:
    """List the LoRA files in ``folder`` and its sub-folders, sorted.

    Raises:
        InvalidArgumentError: If there is none.
    """
    paths = find.list_lora_files(folder)
    if not paths:
        raise InvalidArgumentError(
            f"{str(folder)!r} holds no LoRA file (.safetensors): name the folder they are in"
        )
    return paths


def infer_layout(folder: Path, modules: Mapping[str, nn.Module], base: str) -> LoraLayout:
    """Infer the layout from the first file that fits the base model.

    Args:
        folder: Folder of LoRA files.
        modules: Denoiser and text encoders of the base model, by component.
        base: Id of the base model.

    Returns:
        Layout with the rank of that file.

    Raises:
        InvalidArgumentError: If no file fits.
    """
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
    """Write a dataset of all files with the target modules of a layout; file names become subjects.

    Args:
        folder: Folder of LoRA files of any dialect.
        output_dir: Folder to write ``loras-00000.safetensors``, ... and, last, ``table.parquet``
            into.
        layout: Layout of the dataset. LoRAs of other ranks are converted by SVD.
        rows_per_shard: LoRAs in each shard.

    Returns:
        Counts and messages.

    Raises:
        InvalidArgumentError: If no file fits, or ``output_dir`` already holds a dataset.
    """
    if (output_dir / TABLE_NAME).exists() or any(
        not f.name.startswith("loras-") for f in output_dir.glob("*.safetensors")
    ):
        raise InvalidArgumentError(
            f"{str(output_dir)!r} holds LoRAs already: import into another folder"
        )
    # of a run that was killed before it wrote its table
    for partial_shard in output_dir.glob("loras-*.safetensors"):
        partial_shard.unlink()
    rows, records, num_shards = list[Tensor](), list[LoraRecord](), 0
    errors, warnings = list[str](), list[str]()
    paths = list_lora_files(folder)
    for path in track(paths, "importing", "files", len(paths)):
        name = path.relative_to(folder).with_suffix("").as_posix()
        try:
            lora_file = load_lora(path, layout=layout)
            weights, truncation_error = _resize_to_rank(lora_file.weights, layout.rank)
        except HyperloraError as error:
            errors.append(f"refused: {name}: {error}")
            continue
        if truncation_error > 1e-4:
            warnings.append(
                f"note: {name}: rank {lora_file.weights.layout.rank} cut to {layout.rank}, "
                f"{truncation_error:.1%} of ΔW lost"
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
    """Convert a LoRA to another rank; returns it and the relative error of ΔW."""
    if weights.layout.rank == rank:
        return weights, 0.0
    resized = weights.resize(rank)
    return resized, compute_relative_error(resized, weights)


def _write_shard(output_dir: Path, shard_index: int, rows: list[Tensor], layout: LoraLayout) -> int:
    """Write a shard and return the number of the next one."""
    write_bytes(
        serialize_shard(torch.stack(rows), layout, ()),
        output_dir / f"loras-{shard_index:05d}.safetensors",
    )
    return shard_index + 1
