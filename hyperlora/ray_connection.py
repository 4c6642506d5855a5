"""Connection to a Ray cluster."""

import os
from math import ceil
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


def compute_worker_gpus(ray: ModuleType, device: str, num_workers: int = 1) -> float:
    """Compute how much of a GPU each worker reserves.

    Ray hides the GPUs that a worker has not reserved, and shows it those that it has. There the
    device ``auto`` finds the GPU.

    Args:
        ray: The connected module.
        device: ``device`` of the ``ComputeConfig`` that the workers make.
        num_workers: Workers that must run at the same time; several may share a GPU.

    Returns:
        A whole GPU or a fraction, 0 for the CPU and on a cluster without GPUs.
    """
    if device == "cpu" or not ray.is_initialized():
        return 0.0
    num_gpus = ray.cluster_resources().get("GPU", 0.0)
    return 1 / ceil(num_workers / num_gpus) if num_gpus else 0.0
