"""Safetensors files as bytes on disk: ``read_tensors`` trusts nothing, ``write_tensors`` leaves all or nothing."""

import io
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
_NAMES: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES: Final = frozenset(_NAMES.values())
_ALPHA_DTYPES: Final = _DTYPES | {"I64", "I32", "F64"}
_KEY: Final = re.compile(r"\w+(\.\w+)*", re.ASCII)


def read_tensors(source: Path | bytes, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a file or its bytes, after checking size, count, names, dtypes and finiteness;
    ``name`` is what messages call it.

    Raises ``BadLoraFile`` naming what is wrong; nothing is ever unpickled.
    """
    if isinstance(source, Path):
        if source.suffix != ".safetensors":
            raise BadLoraFile(f"{name} is not a .safetensors file: other formats can run code and are never opened")
        if not source.is_file():
            raise BadLoraFile(f"there is no file {source}")
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > MAX_BYTES:
        raise BadLoraFile(f"{name} is {size / 2**30:.1f} GiB, at most {MAX_BYTES >> 30} GiB are read")
    entries = table_of_contents(source, size, name)
    metadata = _metadata(entries, name)
    if not 0 < len(entries) <= MAX_TENSORS:
        raise BadLoraFile(f"{name} holds {len(entries)} tensors, expected 1 to {MAX_TENSORS}")
    for key, entry in entries.items():
        if len(key) > MAX_KEY_LENGTH or not _KEY.fullmatch(key):
            raise BadLoraFile(f"{name} has a tensor named {key[:80]!r}, which is no module path")
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if dtype not in (_ALPHA_DTYPES if key.endswith(".alpha") else _DTYPES):
            raise BadLoraFile(f"tensor {key} of {name} has dtype {dtype}, expected one of {sorted(_DTYPES)}")
    try:
        load = safetensors.torch.load if isinstance(source, bytes) else safetensors.torch.load_file
        tensors = load(source)  # type: ignore[arg-type]
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise BadLoraFile(f"{name} is not a sound safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadLoraFile(f"tensor {key} of {name} holds NaN or infinity: the LoRA is broken")
    return {key: tensors[key] for key in entries}, metadata  # safetensors' own order changes from run to run


def read_metadata(path: Path) -> dict[str, str]:
    """The header's table of texts alone. Raises ``BadLoraFile`` if it cannot be read."""
    return _metadata(table_of_contents(path, path.stat().st_size, path.name), path.name)


def encoded(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A whole safetensors file, the bytes that ``safetensors.torch.save`` writes but for the order of the metadata: its
    own changes from run to run. A LoRA has hundreds of small tensors, and it takes 50 µs for each."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    table: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    end = 0
    for key, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        table[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    numbers: list[Any] = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for _, t in ordered]
    return b"".join((len(header).to_bytes(8, "little"), header, *numbers))


def write_bytes(data: bytes, path: Path) -> None:
    """Write ``path`` (and missing parent folders) through a temporary file beside it, synced to disk, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The key of the first tensor with NaN or infinity."""
    if torch.nn.utils.get_total_norm(tensors.values(), float("inf")).isfinite():  # one call for all
        return None
    return next((key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def _metadata(entries: dict[str, Any], name: str) -> dict[str, str]:
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadLoraFile(f"{name} has a header that is not a table of strings")
    return metadata


def table_of_contents(source: Path | bytes, size: int, name: str) -> dict[str, Any]:
    """The file's JSON header; unlike safetensors' own reader it refuses duplicate keys."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise BadLoraFile(f"{name} is not a safetensors file: its header claims {length} bytes")
        raw = file.read(length)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise BadLoraFile(f"{name} has the key {key[:80]!r} twice")
            found[key] = value
        return found

    try:
        table = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadLoraFile(f"{name} is not a safetensors file: its header is no JSON") from error
    if not isinstance(table, dict):
        raise BadLoraFile(f"{name} is not a safetensors file: its header is no table")
    return table
