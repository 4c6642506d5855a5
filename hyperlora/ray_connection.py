"""Connection to a Ray cluster."""

import os
from types import ModuleType

from hyperlora.errors import InvalidArgumentError, format_reason


def connect_ray(address: str) -> ModuleType:
    """Import ``ray`` and connect to a cluster.

    Args:
        address: The address of a cluster, or ``local`` to start one in this process.

    Returns:
        The module ``ray``.

    Raises:
        InvalidArgumentError: Ray is not installed, or no cluster answers.
    """
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
            raise InvalidArgumentError(
                f"no Ray cluster answers at {address!r} ({format_reason(error)}): "
                f"start one, or leave --ray"
            ) from error
    return ray
