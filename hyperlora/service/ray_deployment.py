"""The service on Ray Serve: the models as a deployment of replicas, before them the same app.

``start_ray_engine`` is what ``main_callback serve --ray`` uses: the app in this process, its own HTTP server, replicas behind it.
``build_application`` is for ``serve deploy`` and Kubernetes: the app too is a deployment, behind Ray's proxy.
"""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from hyperlora.service.app import create_app
from hyperlora.service.engine.factory import ModelPaths, make_engine_factory
from hyperlora.service.engine.ray import RayEngine, Replica
from hyperlora.service.file_store import lock_directory
from hyperlora.service.settings import ServiceSettings, load_api_keys

os.environ.setdefault(
    "RAY_USAGE_STATS_ENABLED", "0"
)  # before Ray is imported: it would tell of its use
APP_NAME: Final = "hyperlora"
MODEL_DEPLOYMENT: Final = "Models"
_QUIET_LOGGING: Final = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True)
class ScaleConfig:
    """How many replicas: ``num_replicas`` always, up to ``max_replicas`` as requests wait; ``num_cpus`` and ``num_gpus`` of each."""

    num_replicas: int = 1
    max_replicas: int | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0


def build_model_deployment(
    models: ModelPaths, settings: ServiceSettings, scale: ScaleConfig
) -> Application:
    """Replicas that hold the models. A replica is asked for twice what one forward takes, so that a batch is there
    when the last is done; the others wait at the handle."""
    max_replicas = max(scale.num_replicas, scale.max_replicas or 0)
    replica_options: dict[str, Any] = {"num_replicas": scale.num_replicas}
    if max_replicas > scale.num_replicas:
        load_target = {"target_ongoing_requests": settings.max_lora_batch / 2}
        replica_options = {
            "autoscaling_config": {
                "min_replicas": scale.num_replicas,
                "max_replicas": max_replicas,
                **load_target,
            }
        }
    deployment = serve.deployment(
        name=MODEL_DEPLOYMENT,
        max_ongoing_requests=2 * settings.max_lora_batch,
        max_queued_requests=settings.max_queue_size,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        ray_actor_options={"num_cpus": scale.num_cpus, "num_gpus": scale.num_gpus},
        **replica_options,
    )(Replica)
    return deployment.bind(
        partial(make_engine_factory, models, replace(settings, keys=frozenset()))
    )


@contextmanager
def start_ray_engine(
    models: ModelPaths, settings: ServiceSettings, scale: ScaleConfig
) -> Iterator[RayEngine]:
    """An engine over replicas: in the cluster that ``RAY_ADDRESS`` names, or in one on this machine that ends with the
    context. Raises ``HyperloraError`` for models that cannot be loaded."""
    is_existing_cluster = "RAY_ADDRESS" in os.environ
    with ExitStack() as stack:
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            **{} if is_existing_cluster else make_local_cluster_options(scale),
        )
        stack.callback(ray.shutdown)
        serve.start(proxy_location="Disabled", logging_config=_QUIET_LOGGING)
        if is_existing_cluster:  # our own ends as a whole: to take it apart in order may mean to wait for a replica that is starting
            stack.callback(serve.delete, APP_NAME)
        deployment = build_model_deployment(models, settings, scale)
        handle = serve.run(
            deployment, name=APP_NAME, route_prefix=None, logging_config=_QUIET_LOGGING
        )
        engine = RayEngine(handle, APP_NAME, MODEL_DEPLOYMENT)
        engine.list_models()
        yield engine


def build_application(args: dict[str, Any]) -> Application:
    """For ``serve run main_callback.service.ray_deployment:build_application num_replicas=2``; ``docs/deploy.md`` names the ``args``.

    The app is one replica, which owns the jobs and what is kept; the models are as many as asked for.
    """
    options = dict(args)
    state_dir = Path(options.pop("state", "hyperlora-state"))
    key_file = Path(options.pop("keys")) if "keys" in options else None
    scale = ScaleConfig(
        int(options.pop("replicas", 1)),
        int(options.pop("max_replicas", 0)) or None,
        float(options.pop("cpus", 1)),
        float(options.pop("gpus", 0)),
    )
    models, settings = ModelPaths(**options), ServiceSettings(state_dir)

    def make_app() -> FastAPI:
        app_name = serve.get_replica_context().app_name
        stack = ExitStack()
        stack.enter_context(lock_directory(state_dir))  # for as long as this process lives
        engine = RayEngine(
            serve.get_deployment_handle(MODEL_DEPLOYMENT, app_name), app_name, MODEL_DEPLOYMENT
        )
        app = create_app(lambda observe: engine, replace(settings, keys=load_api_keys(key_file)))
        app.state.held = stack
        return app

    deployment = serve.deployment(name="Door", num_replicas=1, max_ongoing_requests=1024)(
        serve.ingress(make_app)()
    )
    return deployment.bind(build_model_deployment(models, settings, scale))


def make_local_cluster_options(scale: ScaleConfig) -> dict[str, Any]:
    """A cluster of this machine alone. It listens to other machines too, but only we have the token it asks for; and it
    never writes to a disk what it is handed."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    return {
        "address": "local",
        "num_cpus": max(
            os.cpu_count() or 1,
            round(scale.num_cpus * max(scale.num_replicas, scale.max_replicas or 0)) + 1,
        ),
        "include_dashboard": False,
        "object_store_memory": 512 << 20,
        "_system_config": {"automatic_object_spilling_enabled": False, "worker_niceness": 0},
    }
