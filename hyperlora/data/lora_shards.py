"""One shard of a LoRA dataset: ``evaluate_suite`` [n, P] in layout order, and in its header the layout, the base, the layout's
fingerprint and a table of what each row is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from hyperlora.errors import InvalidLoraFileError
from hyperlora.lora.io.safetensors_file import read_header, serialize_tensors
from hyperlora.lora.layout import LoraLayout

_DTYPES: Final = {
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),
}


@dataclass(frozen=True)
class LoraRecord:
    """What one row is: whose, of which photos (SHA-256 of the files), by which seed and how many steps. ``loss`` is the
    mean of the last steps; ``initial_loss`` and ``best_loss`` are the loss on fixed draws without the LoRA's training and at its
    best; ``score`` is what an audit gave it. ``repetition`` counts the LoRAs of one subject."""

    subject: str
    repetition: int = 0
    split: str = "train"
    seed: int = 0
    reference_sha256: tuple[str, ...] = ()
    num_steps: int = 0
    loss: float | None = None
    initial_loss: float | None = None
    best_loss: float | None = None
    score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LoraRecord":
        """Inverse of ``source_to_dict``; other keys are ignored."""
        field_values = {
            dataclass_field.name: data[dataclass_field.name]
            for dataclass_field in fields(cls)
            if dataclass_field.name in data
        }
        return cls(**{**field_values, "images": tuple(field_values.get("images") or ())})


@dataclass(frozen=True)
class Shard:
    """An open shard; ``evaluate_suite`` are mapped, not read. ``metadata`` are the header's other texts."""

    path: Path
    layout: LoraLayout
    rows: Tensor
    records: tuple[LoraRecord, ...]
    metadata: Mapping[str, str]


def serialize_shard(
    rows: Tensor,
    layout: LoraLayout,
    records: Sequence[LoraRecord],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """The whole file; the same content gives the same bytes. Undone by ``open_shard``."""
    shard_metadata = {
        "hyperlora.layout": json.dumps(layout.to_dict(), separators=(",", ":")),
        "hyperlora.base": layout.base,
        "hyperlora.layout_fingerprint": layout.fingerprint,
        "hyperlora.table": json.dumps(
            [record.to_dict() for record in records], separators=(",", ":")
        ),
    }
    return serialize_tensors({"rows": rows}, {**(metadata or {}), **shard_metadata})


def open_shard(path: Path) -> Shard:
    """Raises ``InvalidLoraFileError`` for a file that is no shard or not whole."""
    file_name = path.name
    try:
        file_size = path.stat().st_size
        header = read_header(path, file_size, file_name)
        metadata = header.pop("__metadata__")
        tensor_info = header["rows"]
        numpy_dtype, torch_dtype = _DTYPES[tensor_info["dtype"]]
        num_rows, numel = tensor_info["shape"]
        layout = LoraLayout.from_dict(json.loads(metadata["hyperlora.layout"]))
        records = tuple(
            LoraRecord.from_dict(record) for record in json.loads(metadata["hyperlora.table"])
        )
        begin_offset, end_offset = tensor_info["data_offsets"]
        is_valid = (
            numel == layout.numel
            and end_offset - begin_offset == num_rows * numel * np.dtype(numpy_dtype).itemsize
        )
    except FileNotFoundError as error:
        raise InvalidLoraFileError(f"there is no file {str(path)!r}") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InvalidLoraFileError(
            f"{file_name} is no shard of a LoRA dataset (rows and a layout in its header expected)"
        ) from error
    if not is_valid or layout.fingerprint != metadata.get("hyperlora.layout_fingerprint"):
        raise InvalidLoraFileError(
            f"{file_name} is a damaged shard: its rows do not fit its layout"
        )
    with path.open("rb") as file:
        data_offset = 8 + int.from_bytes(file.read(8), "little") + begin_offset
    if file_size < data_offset + end_offset - begin_offset:
        raise InvalidLoraFileError(
            f"{file_name} is cut off: {data_offset + end_offset - begin_offset} bytes expected, {file_size} found"
        )
    # "c": pages are copied when written to, so that torch takes the mapping as an ordinary tensor
    mapped_rows = (
        np.memmap(path, numpy_dtype, "c", data_offset, (num_rows, numel))
        if num_rows
        else np.zeros((0, numel), numpy_dtype)
    )
    reserved_keys = ("hyperlora.layout", "hyperlora.table")
    extra_metadata = {key: value for key, value in metadata.items() if key not in reserved_keys}
    return Shard(
        path, layout, torch.from_numpy(mapped_rows).view(torch_dtype), records, extra_metadata
    )
