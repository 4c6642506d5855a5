"""``ServiceSettings``: what an operator decides."""

import hashlib
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final

from hyperlora.errors import InvalidArgumentError

API_KEYS_ENV: Final = "HYPERLORA_API_KEYS"
"""Environment variable of API keys, separated by commas."""
_MIN_KEY_LENGTH: Final = 16


@dataclass(frozen=True)
class EngineLimits:
    """Sizes of an engine's queue and of its batches.

    Attributes:
        max_queue_size: Requests that may wait for the model.
        max_queue_size_per_owner: The same for one caller.
        max_lora_batch: LoRAs that are predicted in one forward pass.
        max_image_batch: Images that are denoised in one batch.
        max_batch_pixels: Pixels of these images together, unless one alone has more.
        max_pixel_steps: Pixels times denoising steps of one image, unless the base's default image
            needs more.
        max_pixels: Pixels of one denoising step, unless all steps of the base's default image have
            more.
    """

    max_queue_size: int = 256
    max_queue_size_per_owner: int = 64
    max_lora_batch: int = 32
    max_image_batch: int = 8
    max_batch_pixels: int = 2 << 20
    max_pixel_steps: int = 16 << 20
    max_pixels: int = 1 << 16


@dataclass(frozen=True)
class ServiceSettings:
    """Limits, lifetimes and folders of a server.

    Attributes:
        state_dir: Folder of the job table and of stored files.
        lora_dir: Folder of LoRA files that prompts may name; None for none.
        key_digests: SHA-256 digests of API keys. Without any, this machine alone may call.
        rate_limit: Requests per key in the notation of the ``limits`` library.
        max_form_bytes: Largest body of a form.
        max_json_bytes: Largest JSON with LoRAs in it; it takes twice its size while it is parsed.
        max_photos: Photos, images or pairs in one request.
        body_timeout_s: Seconds until the body of a request is complete.
        timeout_s: Seconds that a synchronous request may take.
        max_queue_size: Requests that may wait for the model.
        max_queue_size_per_owner: The same for one caller.
        max_jobs: Jobs that may be accepted and not finished.
        max_jobs_per_owner: The same for one caller.
        max_lora_batch: LoRAs that are predicted in one forward pass.
        max_image_batch: Images that are denoised in one batch.
        max_batch_pixels: Pixels of these images together, unless one alone has more.
        max_pixel_steps: Pixels times denoising steps of one image, unless the base's default image
            needs more.
        max_pixels: Pixels of one denoising step, unless all steps of the base's default image have
            more.
        retention_s: Seconds that stored files and finished jobs are kept.
        drain_timeout_s: Seconds that accepted requests and jobs get when the server stops.
        sweep_interval_s: Seconds between two deletions of what is out of date.
        public_https: Whether a proxy speaks HTTPS, so that cookies are for HTTPS alone.
    """

    state_dir: Path
    lora_dir: Path | None = None
    key_digests: frozenset[bytes] = field(default_factory=frozenset, repr=False)
    rate_limit: str = "600/minute"
    max_form_bytes: int = 64 << 20
    max_json_bytes: int = 16 << 20
    max_photos: int = 8
    body_timeout_s: float = 60.0
    timeout_s: float = 120.0
    max_queue_size: int = EngineLimits.max_queue_size
    max_queue_size_per_owner: int = EngineLimits.max_queue_size_per_owner
    max_jobs: int = 128
    max_jobs_per_owner: int = 64
    max_lora_batch: int = EngineLimits.max_lora_batch
    max_image_batch: int = EngineLimits.max_image_batch
    max_batch_pixels: int = EngineLimits.max_batch_pixels
    max_pixel_steps: int = EngineLimits.max_pixel_steps
    max_pixels: int = EngineLimits.max_pixels
    retention_s: float = 24 * 3600.0
    drain_timeout_s: float = 8.0
    sweep_interval_s: float = 600.0
    public_https: bool = False

    @property
    def max_lora_bytes(self) -> int:
        """Largest LoRA file that JSON holds, in Base64."""
        return self.max_json_bytes * 3 // 4 - 4096

    @property
    def engine_limits(self) -> EngineLimits:
        """The limits of the engine."""
        names = [field.name for field in fields(EngineLimits)]
        return EngineLimits(**{name: getattr(self, name) for name in names})


def load_api_keys(path: Path | None) -> frozenset[bytes]:
    """Load API keys from a file (one per line) and from the environment (comma-separated).

    Args:
        path: The file, or None for the environment alone.

    Returns:
        The SHA-256 digests of the keys.

    Raises:
        InvalidArgumentError: If the file cannot be read or holds no key, or a key is too short.
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
    """Compute the SHA-256 digest of an API key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
