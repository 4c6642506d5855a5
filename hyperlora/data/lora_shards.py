"""A shard of a LoRA dataset: one safetensors file of flat LoRAs.

It holds rows [n, P] in layout order. Its metadata holds the layout, the base, the layout's
fingerprint, a digest of the rows and a table of what each row is.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor

from hyperlora.errors import InvalidLoraFileError
from hyperlora.lora.io.safetensors_file import read_header, serialize_tensors
from hyperlora.lora.layout import LoraLayout

_LAYOUT_KEY: Final = "hyperlora.layout"
_BASE_KEY: Final = "hyperlora.base"
_FINGERPRINT_KEY: Final = "hyperlora.layout_fingerprint"
_TABLE_KEY: Final = "hyperlora.table"
_DIGEST_KEY: Final = "hyperlora.rows_sha256"
_DTYPES: Final = {
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),  # numpy has no bfloat16: the bits are viewed as such
}


@dataclass(frozen=True)
class LoraRecord:
    """What one row of a dataset is.

    Attributes:
        subject: The name of the subject.
        repetition: The number of the LoRA among those of its subject, from 0.
        split: ``train``, ``validation`` or ``test``.
        seed: The seed of its training.
        reference_sha256: The SHA-256 of its photos' files.
        num_steps: The steps of its training.
        loss: The mean loss of the last steps.
        initial_loss: The loss on fixed examples before training.
        best_loss: The lowest loss on the same examples.
        score: The score of an audit.
    """

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
        """List the fields for JSON or Parquet. Undone by ``from_dict``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read a record as ``to_dict`` writes it; other keys are ignored."""
        values = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        return cls(**values | {"reference_sha256": tuple(values.get("reference_sha256") or ())})


@dataclass(frozen=True)
class Shard:
    """An open shard.

    Attributes:
        path: The file.
        layout: The layout of the LoRAs.
        rows: [n, P], mapped from the file and not read yet.
        records: What each row is.
        metadata: The other metadata of the file.
    """

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
    """Serialize a shard; the same content gives the same bytes. Undone by ``open_shard``.

    Args:
        rows: [n, P] in float32, float16 or bfloat16.
        layout: The layout of the LoRAs, of P numbers.
        records: What each row is.
        metadata: Further metadata of the file.

    Returns:
        A whole safetensors file.
    """
    table = [record.to_dict() for record in records]
    shard_metadata = {
        _LAYOUT_KEY: json.dumps(layout.to_dict(), separators=(",", ":")),
        _BASE_KEY: layout.base,
        _FINGERPRINT_KEY: layout.fingerprint,
        _TABLE_KEY: json.dumps(table, separators=(",", ":")),
        _DIGEST_KEY: _compute_digest(rows),
    }
    return serialize_tensors({"rows": rows}, {**(metadata or {}), **shard_metadata})


def open_shard(path: Path) -> Shard:
    """Open a shard without reading its rows.

    Args:
        path: The file.

    Returns:
        The shard, whose rows are memory-mapped.

    Raises:
        InvalidLoraFileError: There is no such file, it is no shard, or it is damaged.
    """
    file_name = path.name
    try:
        file_size = path.stat().st_size
        header: dict[str, Any] = dict(read_header(path, file_size, file_name))
        metadata = header.pop("__metadata__")
        entry = header["rows"]
        numpy_dtype, torch_dtype = _DTYPES[entry["dtype"]]
        num_rows, numel = entry["shape"]
        layout = LoraLayout.from_dict(json.loads(metadata[_LAYOUT_KEY]))
        records = tuple(LoraRecord.from_dict(row) for row in json.loads(metadata[_TABLE_KEY]))
        begin_offset, end_offset = entry["data_offsets"]
        num_bytes = num_rows * numel * np.dtype(numpy_dtype).itemsize
        is_valid = numel == layout.numel and end_offset - begin_offset == num_bytes
    except FileNotFoundError as error:
        raise InvalidLoraFileError(f"there is no file {str(path)!r}") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InvalidLoraFileError(
            f"{file_name} is no shard of a LoRA dataset (rows and a layout expected)"
        ) from error
    if not is_valid or layout.fingerprint != metadata.get(_FINGERPRINT_KEY):
        raise InvalidLoraFileError(
            f"{file_name} is a damaged shard: its rows do not fit its layout"
        )
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    data_offset = 8 + header_bytes + begin_offset
    if file_size < data_offset + num_bytes:
        raise InvalidLoraFileError(
            f"{file_name} is cut off: {data_offset + num_bytes} bytes expected, {file_size} found"
        )
    # "c": pages are copied when written to, so that torch takes the mapping as an ordinary tensor
    mapped_rows = (
        np.memmap(path, numpy_dtype, "c", data_offset, (num_rows, numel))
        if num_rows
        else np.zeros((0, numel), numpy_dtype)  # an empty mapping is an error
    )
    rows = torch.from_numpy(mapped_rows).view(torch_dtype)
    other_metadata = {k: v for k, v in metadata.items() if k not in (_LAYOUT_KEY, _TABLE_KEY)}
    return Shard(path, layout, rows, records, other_metadata)


def check_digest(shard: Shard) -> None:
    """Check the rows of a shard against their digest; shards of earlier versions have none.

    Raises:
        InvalidLoraFileError: The rows are others than those that were written.
    """
    expected = shard.metadata.get(_DIGEST_KEY)
    if expected is not None and _compute_digest(shard.rows) != expected:
        raise InvalidLoraFileError(
            f"{str(shard.path)!r} is damaged: its rows are not those that were written; "
            "remove the file, and make it again"
        )


def _compute_digest(rows: Tensor) -> str:
    """Compute the SHA-256 of rows [n, P] as the file holds them."""
    return hashlib.sha256(rows.contiguous().view(torch.uint8).cpu().numpy().data).hexdigest()
