"""The hashes of a LoRA file in its own header, as kohya, A1111 and ModelSpec compute them.

sshs_model_hash          SHA-256 of all bytes after the header: A1111's hash of a LoRA
sshs_legacy_hash         first 8 digits of the SHA-256 of bytes 0x100000 to 0x110000 of the file
                         with nothing but the ``ss_`` keys in its header
modelspec.hash_sha256    ``0x`` and the first
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Final

from hyperlora.lora.io.safetensors_file import TensorEntry, encode_header

_LEGACY_RANGE: Final = (0x100000, 0x110000)
HASH_KEYS: Final = frozenset({"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"})
"""The keys that ``compute_hashes`` returns."""


def compute_hashes(
    entries: Mapping[str, TensorEntry], metadata: Mapping[str, str], buffers: Sequence[memoryview]
) -> dict[str, str]:
    """Compute the hashes of a file before it is put together.

    Args:
        entries: The entries of its header, in order.
        metadata: Its metadata.
        buffers: The bytes of each tensor, in the same order.

    Returns:
        Three keys for its metadata.
    """
    hasher = hashlib.sha256()
    for buffer in buffers:
        hasher.update(buffer)
    digest = hasher.hexdigest()
    kohya_metadata = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    return {
        "sshs_model_hash": digest,
        "sshs_legacy_hash": _compute_legacy_hash(encode_header(entries, kohya_metadata), buffers),
        "modelspec.hash_sha256": f"0x{digest}",
    }


def _compute_legacy_hash(header: bytes, buffers: Sequence[memoryview]) -> str:
    """The hash of 64 KiB after the first MiB of a file, nothing of one that is shorter."""
    begin, end = _LEGACY_RANGE
    hasher = hashlib.sha256()
    offset = 0
    for buffer in chain((memoryview(header),), buffers):
        hasher.update(buffer[max(begin - offset, 0) : max(end - offset, 0)])
        offset += len(buffer)
    return hasher.hexdigest()[:8]
