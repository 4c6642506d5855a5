"""``ServiceSettings``: what an operator decides."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hyperlora.errors import InvalidArgumentError

API_KEYS_ENV: Final = "HYPERLORA_API_KEYS"
_MIN_KEY_LENGTH: Final = 16


@dataclass(frozen=True)
class ServiceSettings:
    """Caps and places. ``key_digests`` are SHA-256 digests of API keys; with none, everyone may call (bind to localhost then).

    ``state_dir`` holds the job table and kept files, ``lora_dir`` ordinary LoRA files that prompts may name. ``rate_limit`` is per
    key, in the words of the ``limits`` library.
    """

    state_dir: Path
    lora_dir: Path | None = None
    key_digests: frozenset[bytes] = field(default_factory=frozenset, repr=False)
    rate_limit: str = "600/minute"
    max_form_bytes: int = 64 << 20  # bytes of a form
    max_json_bytes: int = (
        16 << 20
    )  # bytes of any other body: JSON takes many times its size while it is read
    max_photos: int = 8
    body_timeout_s: float = 60.0  # until a request's body is complete
    timeout_s: float = 120.0  # seconds a synchronous request may take
    max_queue_size: int = 256  # requests waiting for the model
    max_jobs: int = 128  # accepted and not yet finished
    max_jobs_per_owner: int = 64
    max_lora_batch: int = 32  # LoRAs made in one forward
    max_image_batch: int = 8  # pictures denoised in one batch
    retention_s: float = 24 * 3600.0  # lifetime of what is kept on request
    drain_timeout_s: float = 60.0  # for accepted jobs when the server stops
    sweep_interval_s: float = 600.0  # between two looks for what has outlived its time


def load_api_keys(path: Path | None) -> frozenset[bytes]:
    """Digests of the keys in ``path`` (one a line) and in the environment variable (comma-separated).

    Raises ``InvalidArgumentError`` for a file that cannot be read or a key that is too short to be safe.
    """
    try:
        lines = path.read_text().splitlines() if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"the key file {str(path)!r} cannot be read: one key a line expected"
        ) from error
    keys = {key.strip() for key in [*lines, *os.environ.get(API_KEYS_ENV, "").split(",")]} - {""}
    if path and not keys:
        raise InvalidArgumentError(
            f"the key file {str(path)!r} holds no key: one key a line expected"
        )
    if any(len(key) < _MIN_KEY_LENGTH for key in keys):
        raise InvalidArgumentError(
            f"an API key is shorter than {_MIN_KEY_LENGTH} characters: use a longer, random one"
        )
    return frozenset(hash_key(key) for key in keys)


def hash_key(key: str) -> bytes:
    """SHA-256."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
