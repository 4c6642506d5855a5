"""The service on Ray Serve: the models as a deployment of replicas, before them the same app.

``cluster`` is what ``hyperlora serve --ray`` uses: the app in this process, its own HTTP server, replicas behind it.
``application`` is for ``serve deploy`` and Kubernetes: the app too is a deployment, behind Ray's proxy.
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
from hyperlora.service.engine.factory import Models, open_engine
from hyperlora.service.engine.ray import RayEngine, Replica
from hyperlora.service.file_store import owned
from hyperlora.service.settings import ServiceSettings, keys_from

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported: it would tell of its use
APP: Final = "hyperlora"
REPLICAS: Final = "Models"
_QUIET: Final = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True)
class Scale:
    """How many replicas: ``replicas`` always, up to ``most`` as requests wait; ``cpus`` and ``gpus`` of each."""

    replicas: int = 1
    most: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0


def models_deployment(models: Models, settings: ServiceSettings, scale: Scale) -> Application:
    """Replicas that hold the models. A replica is asked for twice what one forward takes, so that a batch is there
    when the last is done; the others wait at the handle."""
    most = max(scale.replicas, scale.most or 0)
    count: dict[str, Any] = {"num_replicas": scale.replicas}
    if most > scale.replicas:
        target = {"target_ongoing_requests": settings.batch / 2}
        count = {"autoscaling_config": {"min_replicas": scale.replicas, "max_replicas": most, **target}}
    deployment = serve.deployment(
        name=REPLICAS,
        max_ongoing_requests=2 * settings.batch,
        max_queued_requests=settings.queue,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        **count,
    )(Replica)
    return deployment.bind(partial(open_engine, models, replace(settings, keys=frozenset())))


@contextmanager
def cluster(models: Models, settings: ServiceSettings, scale: Scale) -> Iterator[RayEngine]:
    """An engine over replicas: in the cluster that ``RAY_ADDRESS`` names, or in one on this machine that ends with the
    context. Raises ``HyperloraError`` for models that cannot be loaded."""
    shared = "RAY_ADDRESS" in os.environ
    with ExitStack() as stack:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **{} if shared else own_cluster(scale))
        stack.callback(ray.shutdown)
        serve.start(proxy_location="Disabled", logging_config=_QUIET)
        if shared:  # our own ends as a whole: to take it apart in order may mean to wait for a replica that is starting
            stack.callback(serve.delete, APP)
        deployment = models_deployment(models, settings, scale)
        handle = serve.run(deployment, name=APP, route_prefix=None, logging_config=_QUIET)
        engine = RayEngine(handle, APP, REPLICAS)
        engine.models()
        yield engine


def application(args: dict[str, Any]) -> Application:
    """For ``serve run hyperlora.service.ray_deployment:application replicas=2``; ``docs/deploy.md`` names the ``args``.

    The app is one replica, which owns the jobs and what is kept; the models are as many as asked for.
    """
    given = dict(args)
    state = Path(given.pop("state", "hyperlora-state"))
    keys = Path(given.pop("keys")) if "keys" in given else None
    scale = Scale(
        int(given.pop("replicas", 1)), int(given.pop("max_replicas", 0)) or None,
        float(given.pop("cpus", 1)), float(given.pop("gpus", 0)),
    )  # fmt: skip
    models, settings = Models(**given), ServiceSettings(state)

    def door() -> FastAPI:
        app = serve.get_replica_context().app_name
        stack = ExitStack()
        stack.enter_context(owned(state))  # for as long as this process lives
        engine = RayEngine(serve.get_deployment_handle(REPLICAS, app), app, REPLICAS)
        made = create_app(lambda observe: engine, replace(settings, keys=keys_from(keys)))
        made.state.held = stack
        return made

    deployment = serve.deployment(name="Door", num_replicas=1, max_ongoing_requests=1024)(serve.ingress(door)())
    return deployment.bind(models_deployment(models, settings, scale))


def own_cluster(scale: Scale) -> dict[str, Any]:
    """A cluster of this machine alone. It listens to other machines too, but only we have the token it asks for; and it
    never writes to a disk what it is handed."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    return {
        "address": "local",
        "num_cpus": max(os.cpu_count() or 1, round(scale.cpus * max(scale.replicas, scale.most or 0)) + 1),
        "include_dashboard": False,
        "object_store_memory": 512 << 20,
        "_system_config": {"automatic_object_spilling_enabled": False, "worker_niceness": 0},
    }
