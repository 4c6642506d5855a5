"""The service on Ray Serve: a deployment of replicas holds the models, the same app calls them.

``start_ray_engine`` is what ``hyperlora serve --ray`` uses: the app runs in this process with its
own HTTP server. ``build_application`` is for ``serve deploy`` and Kubernetes: the app is a
deployment too, behind Ray's proxy.
"""

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

# Ray reads it when it is imported; without it Ray reports its use to its makers
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from hyperlora.compute import ComputeConfig
from hyperlora.ray_connection import compute_worker_gpus
from hyperlora.service.app import create_app
from hyperlora.service.engine.base import EngineFactory
from hyperlora.service.engine.factory import ModelPaths, make_engine_factory
from hyperlora.service.engine.ray import RayEngine, Replica
from hyperlora.service.file_store import lock_directory, make_private_dir
from hyperlora.service.settings import ServiceSettings, load_api_keys

APP_NAME: Final = "hyperlora"
API_DEPLOYMENT: Final = "Api"
MODEL_DEPLOYMENT: Final = "Models"
_QUIET_LOGGING: Final = {"log_level": "WARNING", "enable_access_log": False}
_OBJECT_STORE_BYTES: Final = 512 << 20
_MAX_TEMP_DIR_BYTES: Final = 34
"""Ray adds some 70 to the path; the path of a socket has at most 103 (macOS) or 107."""


@dataclass(frozen=True)
class ScaleConfig:
    """Number and size of the replicas.

    Attributes:
        num_replicas: Replicas that always run.
        max_replicas: Replicas that run while requests wait; None for ``num_replicas``.
        num_cpus: CPU cores of each.
        num_gpus: GPUs of each. By default one or a share of one, where the cluster has any and the
            device is not the CPU.
    """

    num_replicas: int = 1
    max_replicas: int | None = None
    num_cpus: float = 1.0
    num_gpus: float | None = None

    @property
    def peak_replicas(self) -> int:
        """Largest number of replicas."""
        return max(self.num_replicas, self.max_replicas or 0)


def build_model_deployment(
    models: ModelPaths,
    settings: ServiceSettings,
    scale: ScaleConfig,
    compute_options: Mapping[str, Any] | None = None,
) -> Application:
    """Build the deployment of replicas that hold the models.

    A replica takes twice the requests of one forward pass, so that the next batch is there when
    the last is done. Further requests wait at the handle.

    Args:
        models: Which models.
        settings: Sizes of the queue and of batches.
        scale: Number and size of the replicas.
        compute_options: Arguments of the ``ComputeConfig`` that each replica makes.

    Returns:
        The deployment, bound to its arguments.
    """
    options, num_gpus = dict(compute_options or {}), scale.num_gpus
    if num_gpus is None:
        device = options.get("device", "auto")
        num_gpus = compute_worker_gpus(ray, device, scale.peak_replicas)
    autoscaling_config = None
    if scale.peak_replicas > scale.num_replicas:
        autoscaling_config = AutoscalingConfig(
            min_replicas=scale.num_replicas,
            max_replicas=scale.peak_replicas,
            target_ongoing_requests=settings.max_lora_batch / 2,
        )
    deployment = serve.deployment(
        name=MODEL_DEPLOYMENT,
        num_replicas=scale.num_replicas if autoscaling_config is None else None,
        autoscaling_config=autoscaling_config,
        max_ongoing_requests=2 * settings.max_lora_batch,
        max_queued_requests=settings.max_queue_size,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        ray_actor_options={"num_cpus": scale.num_cpus, "num_gpus": num_gpus},
    )(Replica)
    replica_settings = replace(settings, key_digests=frozenset())  # replicas need no keys
    return deployment.bind(partial(_load_models, models, replica_settings, options))


def _load_models(
    models: ModelPaths, settings: ServiceSettings, compute_options: Mapping[str, Any]
) -> EngineFactory:
    """Load the models in a replica, on the device that it finds on its own machine."""
    return make_engine_factory(models, settings, ComputeConfig(**compute_options))


@contextmanager
def start_ray_engine(
    models: ModelPaths,
    settings: ServiceSettings,
    scale: ScaleConfig,
    compute_options: Mapping[str, Any] | None = None,
) -> Iterator[RayEngine]:
    """Run an engine over replicas while the context is open.

    The cluster is the one that ``RAY_ADDRESS`` names, or one on this machine that ends with the
    context.

    Args:
        models: Which models.
        settings: Sizes of the queue and of batches.
        scale: Number and size of the replicas.
        compute_options: Arguments of the ``ComputeConfig`` that each replica makes.

    Yields:
        The engine, whose models are loaded.

    Raises:
        HyperloraError: If a model cannot be loaded.
    """
    is_existing_cluster = "RAY_ADDRESS" in os.environ
    with ExitStack() as stack:
        cluster_options: dict[str, Any] = {}
        if not is_existing_cluster:
            temp_dir = stack.enter_context(make_ray_temp_dir(settings.state_dir))
            cluster_options = make_local_cluster_options(scale) | {"_temp_dir": str(temp_dir)}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **cluster_options)
        stack.callback(ray.shutdown)
        serve.start(proxy_location="Disabled", logging_config=_QUIET_LOGGING)
        # a local cluster ends as a whole: an orderly end may wait for a replica that starts
        if is_existing_cluster:
            stack.callback(serve.delete, APP_NAME)
        deployment = build_model_deployment(models, settings, scale, compute_options)
        handle = serve.run(
            deployment, name=APP_NAME, route_prefix=None, logging_config=_QUIET_LOGGING
        )
        engine = RayEngine(handle, APP_NAME, MODEL_DEPLOYMENT)
        engine.list_models()
        yield engine


def build_application(args: Mapping[str, Any]) -> Application:
    """Build the Serve application: one replica of the app, and the replicas of the models.

    The replica of the app owns the jobs and the stored files.

    Example: ``serve run hyperlora.service.ray_deployment:build_application replicas=2``

    Args:
        args: ``state``, ``keys`` (a file), ``replicas``, ``max_replicas``, ``cpus``, ``gpus``, and
            the fields of ``ComputeConfig`` and ``ModelPaths``.

    Returns:
        The application.
    """
    options = dict(args)
    state_dir = Path(options.pop("state", "hyperlora-state"))
    key_file = Path(options.pop("keys")) if "keys" in options else None
    scale = ScaleConfig(
        num_replicas=int(options.pop("replicas", 1)),
        max_replicas=int(options.pop("max_replicas", 0)) or None,
        num_cpus=float(options.pop("cpus", 1)),
        num_gpus=float(options.pop("gpus")) if "gpus" in options else None,
    )
    compute_fields = [field.name for field in fields(ComputeConfig)]
    compute_options = {name: options.pop(name) for name in compute_fields if name in options}
    models, settings = ModelPaths(**options), ServiceSettings(state_dir)
    ingress = serve.ingress(lambda: _make_app(settings, key_file))()
    deployment = serve.deployment(name=API_DEPLOYMENT, num_replicas=1, max_ongoing_requests=1024)(
        ingress
    )
    return deployment.bind(build_model_deployment(models, settings, scale, compute_options))


def _make_app(settings: ServiceSettings, key_file: Path | None) -> FastAPI:
    """Create the app in its replica, which owns the state folder as long as its process lives."""
    app_name = serve.get_replica_context().app_name
    stack = ExitStack()
    stack.enter_context(lock_directory(settings.state_dir))
    handle = serve.get_deployment_handle(MODEL_DEPLOYMENT, app_name)
    engine = RayEngine(handle, app_name, MODEL_DEPLOYMENT)
    app_settings = replace(settings, key_digests=load_api_keys(key_file))
    app = create_app(lambda on_batch: engine, app_settings)
    app.state.exit_stack = stack
    return app


@contextmanager
def make_ray_temp_dir(state_dir: Path) -> Iterator[Path]:
    """Make a folder for Ray's logs and sockets that no other user can enter.

    It is below the state folder, or below the system's folder of temporary files where the names
    of sockets would be too long. At the end it is removed, as is that of a killed server.

    Args:
        state_dir: Folder that this server owns.

    Yields:
        The folder for Ray, which lets everyone into what it makes itself.
    """
    folder = state_dir.resolve() / "ray"
    if len(os.fsencode(folder)) > _MAX_TEMP_DIR_BYTES:
        folder = Path(tempfile.mkdtemp(prefix="hyperlora-"))
    shutil.rmtree(folder, ignore_errors=True)
    make_private_dir(folder)
    try:
        yield folder / "ray"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_local_cluster_options(scale: ScaleConfig) -> dict[str, Any]:
    """Make the options of ``ray.init`` for a cluster of this machine alone.

    The cluster listens to other machines too, but only this process has its token. It never
    writes to a disk what it is handed.

    Args:
        scale: Number and size of the replicas.

    Returns:
        Keyword arguments of ``ray.init``.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    needed_cpus = round(scale.num_cpus * scale.peak_replicas) + 1
    return {
        "address": "local",
        "num_cpus": max(os.cpu_count() or 1, needed_cpus),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_system_config": {"automatic_object_spilling_enabled": False, "worker_niceness": 0},
    }
