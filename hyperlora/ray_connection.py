import os
from typing import Any

from hyperlora.errors import InvalidArgumentError


def connect_ray(address: str) -> Any:
    """The ``ray`` module, connected. Raises ``InvalidArgumentError`` if it is not installed or nobody answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InvalidArgumentError(
            "running on a cluster needs the extra: pip install 'hyperlora[scale]'"
        ) from error
    if not ray.is_initialized():
        try:
            if address == "local":
                ray.init(include_dashboard=False, log_to_driver=False)
            else:
                ray.init(address, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InvalidArgumentError(
                f"no Ray cluster answers at {address!r} ({reason}): start one, or leave --ray"
            ) from error
    return ray
