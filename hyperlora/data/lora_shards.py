"""One shard of a LoRA dataset: ``rows`` [n, P] in layout order, and in its header the layout, the base, the layout's
fingerprint and a table of what each row is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from hyperlora.errors import BadLoraFile
from hyperlora.lora.io.safetensors_file import encoded, table_of_contents
from hyperlora.lora.layout import LoraLayout

_DTYPES: Final = {"F32": (np.float32, torch.float32), "F16": (np.float16, torch.float16),
                  "BF16": (np.int16, torch.bfloat16)}  # fmt: skip


@dataclass(frozen=True)
class LoraRecord:
    """What one row is: whose, of which photos (SHA-256 of the files), by which seed and how many steps. ``loss`` is the
    mean of the last steps; ``before`` and ``after`` are the loss on fixed draws without the LoRA's training and at its
    best; ``score`` is what an audit gave it. ``view`` counts the LoRAs of one subject."""

    subject: str
    view: int = 0
    split: str = "train"
    seed: int = 0
    images: tuple[str, ...] = ()
    steps: int = 0
    loss: float | None = None
    before: float | None = None
    after: float | None = None
    score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LoraRecord":
        """Inverse of ``to_dict``; other keys are ignored."""
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        return cls(**{**known, "images": tuple(known.get("images") or ())})


@dataclass(frozen=True)
class Shard:
    """An open shard; ``rows`` are mapped, not read. ``notes`` are the header's other texts."""

    path: Path
    layout: LoraLayout
    rows: Tensor
    table: tuple[LoraRecord, ...]
    notes: Mapping[str, str]


def shard_bytes(
    rows: Tensor, layout: LoraLayout, table: Sequence[LoraRecord], notes: Mapping[str, str] | None = None
) -> bytes:
    """The whole file; the same content gives the same bytes. Undone by ``open_shard``."""
    header = {
        "hyperlora.layout": json.dumps(layout.to_dict(), separators=(",", ":")),
        "hyperlora.base": layout.base,
        "hyperlora.layout_fingerprint": layout.fingerprint,
        "hyperlora.table": json.dumps([record.to_dict() for record in table], separators=(",", ":")),
    }
    return encoded({"rows": rows}, {**(notes or {}), **header})


def open_shard(path: Path) -> Shard:
    """Raises ``BadLoraFile`` for a file that is no shard or not whole."""
    name = path.name
    try:
        size = path.stat().st_size
        contents = table_of_contents(path, size, name)
        metadata = contents.pop("__metadata__")
        entry = contents["rows"]
        numpy_type, torch_type = _DTYPES[entry["dtype"]]
        n, numel = entry["shape"]
        layout = LoraLayout.from_dict(json.loads(metadata["hyperlora.layout"]))
        table = tuple(LoraRecord.from_dict(record) for record in json.loads(metadata["hyperlora.table"]))
        first, last = entry["data_offsets"]
        fits = numel == layout.numel and last - first == n * numel * np.dtype(numpy_type).itemsize
    except FileNotFoundError as error:
        raise BadLoraFile(f"there is no file {str(path)!r}") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise BadLoraFile(f"{name} is no shard of a LoRA dataset (rows and a layout in its header expected)") from error
    if not fits or layout.fingerprint != metadata.get("hyperlora.layout_fingerprint"):
        raise BadLoraFile(f"{name} is a damaged shard: its rows do not fit its layout")
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little") + first
    if size < start + last - first:
        raise BadLoraFile(f"{name} is cut off: {start + last - first} bytes expected, {size} found")
    # "c": pages are copied when written to, so that torch takes the mapping as an ordinary tensor
    mapped = np.memmap(path, numpy_type, "c", start, (n, numel)) if n else np.zeros((0, numel), numpy_type)
    known = ("hyperlora.layout", "hyperlora.table")
    notes = {key: value for key, value in metadata.items() if key not in known}
    return Shard(path, layout, torch.from_numpy(mapped).view(torch_type), table, notes)
