"""``ServiceSettings``: what an operator decides."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hyperlora.errors import BadRequest

KEYS_VARIABLE: Final = "HYPERLORA_API_KEYS"
_SHORTEST_KEY: Final = 16


@dataclass(frozen=True)
class ServiceSettings:
    """Caps and places. ``keys`` are SHA-256 digests of API keys; with none, everyone may call (bind to localhost then).

    ``state`` holds the job table and kept files, ``loras`` ordinary LoRA files that prompts may name. ``rate`` is per
    key, in the words of the ``limits`` library.
    """

    state: Path
    loras: Path | None = None
    keys: frozenset[bytes] = field(default_factory=frozenset, repr=False)
    rate: str = "600/minute"
    max_body: int = 64 << 20  # bytes of a form
    max_json: int = 16 << 20  # bytes of any other body: JSON takes many times its size while it is read
    max_photos: int = 8
    body_seconds: float = 60.0  # until a request's body is complete
    deadline: float = 120.0  # seconds a synchronous request may take
    queue: int = 256  # requests waiting for the model
    jobs: int = 128  # accepted and not yet finished
    jobs_per_owner: int = 64
    batch: int = 32  # LoRAs made in one forward
    pictures: int = 8  # pictures denoised in one batch
    keep_seconds: float = 24 * 3600.0  # lifetime of what is kept on request
    drain_seconds: float = 60.0  # for accepted jobs when the server stops
    sweep_seconds: float = 600.0  # between two looks for what has outlived its time


def keys_from(file: Path | None) -> frozenset[bytes]:
    """Digests of the keys in ``file`` (one a line) and in the environment variable (comma-separated).

    Raises ``BadRequest`` for a file that cannot be read or a key that is too short to be safe.
    """
    try:
        lines = file.read_text().splitlines() if file else []
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"the key file {str(file)!r} cannot be read: one key a line expected") from error
    keys = {key.strip() for key in [*lines, *os.environ.get(KEYS_VARIABLE, "").split(",")]} - {""}
    if file and not keys:
        raise BadRequest(f"the key file {str(file)!r} holds no key: one key a line expected")
    if any(len(key) < _SHORTEST_KEY for key in keys):
        raise BadRequest(f"an API key is shorter than {_SHORTEST_KEY} characters: use a longer, random one")
    return frozenset(digest(key) for key in keys)


def digest(key: str) -> bytes:
    """SHA-256."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
