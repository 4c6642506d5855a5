"""A LoRA dataset from a folder of ordinary LoRA files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hyperlora.data.lora_dataset import TABLE, write_table
from hyperlora.data.lora_shards import LoraRecord, shard_bytes
from hyperlora.errors import BadRequest, HyperloraError
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.safetensors_file import write_bytes
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.merge import relative_error
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track


@dataclass(frozen=True)
class Collected:
    """``refused`` files and ``remarks`` on others (such as a rank that was cut), a sentence each."""

    rows: int
    refused: tuple[str, ...]
    remarks: tuple[str, ...]


def lora_files(folder: Path) -> list[Path]:
    """Sorted, also those of sub-folders. Raises ``BadRequest`` if there is none."""
    found = sorted(f for f in folder.rglob("*.safetensors") if not f.name.startswith("."))
    if not found:
        raise BadRequest(f"{str(folder)!r} holds no LoRA file (.safetensors): name the folder they are in")
    return found


def layout_of_files(folder: Path, modules: Mapping[str, nn.Module], base: str) -> LoraLayout:
    """The layout of the first file that fits the live base. Raises ``BadRequest`` if none does."""
    reasons = []
    for file in lora_files(folder):
        try:
            layout = load_lora(file, modules=modules).weights.layout
            return LoraLayout(layout.sites, layout.rank, base)
        except HyperloraError as error:
            reasons.append(str(error))
    raise BadRequest(f"no LoRA file in {str(folder)!r} is for base {base!r}: {reasons[0]}")


def collect(folder: Path, out: Path, layout: LoraLayout, rows_per_shard: int = 4096) -> Collected:
    """Write ``out/loras-00000.safetensors``, ... and ``table.parquet`` (last) of every file that has exactly the sites
    of ``layout``; other ranks are brought to its rank by SVD. Subjects are the files' names.

    Raises ``BadRequest`` if no file fits, or ``out`` holds a dataset already.
    """
    if (out / TABLE).exists() or any(not f.name.startswith("loras-") for f in out.glob("*.safetensors")):
        raise BadRequest(f"{str(out)!r} holds LoRAs already: collect into another folder")
    for half in out.glob("loras-*.safetensors"):  # of a run that was killed before its table
        half.unlink()
    rows, records, refused, remarks, shards = list[Tensor](), list[LoraRecord](), list[str](), list[str](), 0
    files = lora_files(folder)
    for file in track(files, "collecting", "files", len(files)):
        name = file.relative_to(folder).with_suffix("").as_posix()
        try:
            found = load_lora(file, layout=layout)
            weights, lost = _at_rank(found.weights, layout.rank)
        except HyperloraError as error:
            refused.append(f"refused: {name}: {error}")
            continue
        if lost > 1e-4:
            remarks.append(f"note: {name}: rank {found.weights.layout.rank} cut to {layout.rank}, {lost:.1%} lost")
        rows.append(weights.flatten())
        records.append(LoraRecord(name, images=found.header.reference_sha256))
        if len(rows) == rows_per_shard:
            shards, rows = _write(out, shards, rows, layout), []
    if rows:
        shards = _write(out, shards, rows, layout)
    if not shards:
        raise BadRequest(f"none of the {len(files)} files fits: {refused[0]}")
    write_table(records, out / TABLE)
    return Collected(len(records), tuple(refused), tuple(remarks))


def _at_rank(weights: LoraWeights, rank: int) -> tuple[LoraWeights, float]:
    """The LoRA at another rank, and how much of ΔW that loses (relative)."""
    if weights.layout.rank == rank:
        return weights, 0.0
    resized = weights.resize(rank)
    return resized, relative_error(resized, weights)


def _write(out: Path, number: int, rows: list[Tensor], layout: LoraLayout) -> int:
    write_bytes(shard_bytes(torch.stack(rows), layout, ()), out / f"loras-{number:05d}.safetensors")
    return number + 1
