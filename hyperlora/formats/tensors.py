"""Safetensors files as bytes on disk: ``read_tensors`` trusts nothing, ``write_tensors`` leaves all or nothing."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hyperlora.errors import BadLoraFile

MAX_BYTES: Final = 4 << 30
MAX_HEADER_BYTES: Final = 16 << 20
MAX_TENSORS: Final = 20_000
MAX_KEY_LENGTH: Final = 300
_DTYPES: Final = frozenset({"F32", "F16", "BF16"})
_ALPHA_DTYPES: Final = _DTYPES | {"I64", "I32", "F64"}
_KEY: Final = re.compile(r"\w+(\.\w+)*", re.ASCII)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of ``path``, after checking suffix, size, count, names, dtypes and finiteness.

    Raises ``BadLoraFile`` naming what is wrong; nothing is ever unpickled.
    """
    if path.suffix != ".safetensors":
        raise BadLoraFile(f"{path.name} is not a .safetensors file: other formats can run code and are never opened")
    if not path.is_file():
        raise BadLoraFile(f"there is no file {path}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise BadLoraFile(f"{path.name} is {size / 2**30:.1f} GiB, at most {MAX_BYTES >> 30} GiB are read")
    entries = _table_of_contents(path)
    metadata = _metadata(entries, path)
    if not 0 < len(entries) <= MAX_TENSORS:
        raise BadLoraFile(f"{path.name} holds {len(entries)} tensors, expected 1 to {MAX_TENSORS}")
    for key, entry in entries.items():
        if len(key) > MAX_KEY_LENGTH or not _KEY.fullmatch(key):
            raise BadLoraFile(f"{path.name} has a tensor named {key[:80]!r}, which is no module path")
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if dtype not in (_ALPHA_DTYPES if key.endswith(".alpha") else _DTYPES):
            raise BadLoraFile(f"tensor {key} of {path.name} has dtype {dtype}, expected one of {sorted(_DTYPES)}")
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise BadLoraFile(f"{path.name} is not a sound safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadLoraFile(f"tensor {key} of {path.name} holds NaN or infinity: the LoRA is broken")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The header's table of texts alone. Raises ``BadLoraFile`` if it cannot be read."""
    return _metadata(_table_of_contents(path), path)


def write_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write ``path`` (and missing parent folders) through a temporary file beside it, then rename. The same content
    gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    contiguous = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(contiguous, temporary, metadata={"format": "pt", **metadata})
        _sort_metadata(temporary)
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:  # how safetensors tells of a full disk or missing permissions
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The key of the first tensor with NaN or infinity."""
    return next((key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def _sort_metadata(path: Path) -> None:
    """Safetensors writes metadata in an order that changes from run to run."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(length))
        table["__metadata__"] = dict(sorted(table["__metadata__"].items()))
        ordered = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:
            file.seek(8)
            file.write(ordered.ljust(length))


def _metadata(entries: dict[str, Any], path: Path) -> dict[str, str]:
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadLoraFile(f"{path.name} has a header that is not a table of strings")
    return metadata


def _table_of_contents(path: Path) -> dict[str, Any]:
    """The file's JSON header; unlike safetensors' own reader it refuses duplicate keys."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise BadLoraFile(f"{path.name} is not a safetensors file: its header claims {length} bytes")
        raw = file.read(length)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise BadLoraFile(f"{path.name} has the key {key[:80]!r} twice")
            found[key] = value
        return found

    try:
        table = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadLoraFile(f"{path.name} is not a safetensors file: its header is no JSON") from error
    if not isinstance(table, dict):
        raise BadLoraFile(f"{path.name} is not a safetensors file: its header is no table")
    return table
