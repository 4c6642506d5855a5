"""Whether the Hugging Face hub can be reached: without it, only cached files are looked for."""

import socket
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Final
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub.constants
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

PROBE_TIMEOUT_S: Final = 3.0
"""Seconds after which a hub that does not answer counts as unreachable."""


def require_cache_if_offline() -> bool:
    """Switch ``huggingface_hub`` to its offline mode if the hub cannot be reached.

    Cached files then load at once, and others fail at once. Otherwise each missing file takes half
    a minute of retries.

    Returns:
        Whether it is in offline mode.
    """
    if not is_offline_mode() and not can_reach_hub():
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    return is_offline_mode()


def is_repo_id(name: str) -> bool:
    """Return whether a name can be an id on the hub, as ``someone/something``, and not a path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_in_cache(repo_id: str) -> bool:
    """Return whether the cache holds any file of a model on the hub."""
    folder = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    return any(folder.glob("snapshots/*/*"))


def format_offline_error(noun: str) -> str:
    """Format the sentence about what is neither cached nor within reach.

    Args:
        noun: What is missing, e.g. ``base 'someone/something'``.

    Returns:
        The sentence.
    """
    return (
        f"{noun} is not in the cache of the hub, and {huggingface_hub.constants.ENDPOINT} cannot "
        "be reached: connect to it once, or give a folder"
    )


@cache
def can_reach_hub() -> bool:
    """Return whether the hub, or the proxy before it, accepts a connection; asked once."""
    scheme = urlsplit(huggingface_hub.constants.ENDPOINT).scheme
    url = getproxies().get(scheme) or huggingface_hub.constants.ENDPOINT
    parts = urlsplit(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    answers: list[bool] = []

    def connect() -> None:
        """Open and close a connection."""
        try:
            socket.create_connection((parts.hostname or "", port), PROBE_TIMEOUT_S).close()
        except OSError:
            return
        answers.append(True)

    # a thread: the lookup of a name has no timeout of its own
    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_S)
    return bool(answers)
