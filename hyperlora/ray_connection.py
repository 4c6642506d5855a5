import os
from typing import Any

from hyperlora.errors import BadRequest


def connected(address: str) -> Any:
    """The ``ray`` module, connected. Raises ``BadRequest`` if it is not installed or nobody answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise BadRequest("running on a cluster needs the extra: pip install 'hyperlora[scale]'") from error
    if not ray.is_initialized():
        try:
            if address == "local":
                ray.init(include_dashboard=False, log_to_driver=False)
            else:
                ray.init(address, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadRequest(f"no Ray cluster answers at {address!r} ({reason}): start one, or leave --ray") from error
    return ray
