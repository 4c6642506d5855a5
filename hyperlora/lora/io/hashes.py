"""The hashes of a LoRA file in its own header, as kohya, A1111 and ModelSpec compute them.

sshs_model_hash          SHA-256 of all bytes after the header: A1111's hash of a LoRA
sshs_legacy_hash         first 8 digits of the SHA-256 of bytes 0x100000 to 0x110000 of the file
                         with nothing but the ``ss_`` keys in its header
modelspec.hash_sha256    ``0x`` and the first
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Final

_LEGACY_RANGE: Final = (0x100000, 0x110000)
HASH_KEYS: Final = frozenset({"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"})
"""The keys that ``add_hashes`` writes."""


def add_hashes(data: bytes) -> bytes:
    """Add the hashes of a file's tensors to its header.

    Args:
        data: A whole safetensors file, as ``serialize_tensors`` makes it.

    Returns:
        The file with three more keys in its metadata.
    """
    header_end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:header_end])
    tensor_bytes = memoryview(data)[header_end:]
    digest = hashlib.sha256(tensor_bytes).hexdigest()
    metadata: dict[str, str] = header.pop("__metadata__")
    kohya_metadata = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    hashes = {
        "sshs_model_hash": digest,
        "sshs_legacy_hash": _compute_legacy_hash(
            _encode_header(header, kohya_metadata), tensor_bytes
        ),
        "modelspec.hash_sha256": f"0x{digest}",
    }
    return b"".join((_encode_header(header, metadata | hashes), tensor_bytes))


def _encode_header(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file: the length of its header, and the header."""
    contents = {"__metadata__": dict(sorted(metadata.items())), **entries}
    header = json.dumps(contents, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _compute_legacy_hash(header: bytes, tensor_bytes: memoryview) -> str:
    """The hash of 64 KiB after the first MiB of a file, nothing of one that is shorter."""
    begin, end = _LEGACY_RANGE
    tensor_begin = max(begin - len(header), 0)
    tensor_end = max(end - len(header), 0)
    digest = hashlib.sha256(header[begin:end])
    digest.update(tensor_bytes[tensor_begin:tensor_end])
    return digest.hexdigest()[:8]
