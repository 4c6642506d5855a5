"""``create_app``: the FastAPI application over an engine."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Final

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.formparsers import MultiPartParser

from hyperlora.service.api import edits, images, jobs, loras, similarity, system
from hyperlora.service.engine.base import EngineFactory
from hyperlora.service.errors import add_problem_schema, install_handlers
from hyperlora.service.file_store import FileStore, make_private_dir
from hyperlora.service.jobs import Jobs
from hyperlora.service.metrics import Metrics, MetricsMiddleware
from hyperlora.service.security import ApiKeyAuth, AuthMiddleware, BodyLimitMiddleware
from hyperlora.service.settings import ServiceSettings
from hyperlora.service.shutdown import Shutdown
from hyperlora.service.state import AppState

_log = logging.getLogger("hyperlora.service")
_MAX_OTHER_JSON_BYTES: Final = 1 << 20
"""Largest JSON without the content of a LoRA, which /v1/images alone takes."""


def create_app(make_engine: EngineFactory, settings: ServiceSettings) -> FastAPI:
    """Create the application.

    The app holds its ``AppState`` as ``app.state.service`` while the server runs, and its
    ``ApiKeyAuth`` as ``app.state.auth``.

    Args:
        make_engine: Starts the engine when the server starts; it receives the callback for
            batch sizes.
        settings: What the operator decides.

    Returns:
        The ASGI application.
    """
    MultiPartParser.spool_max_size = settings.max_form_bytes  # photos never touch the disk
    metrics = Metrics()

    @asynccontextmanager
    async def run_lifespan(app: FastAPI) -> AsyncIterator[None]:
        state = _build_app_state(make_engine, settings, metrics)
        app.state.service = state
        sweep_task = asyncio.create_task(_delete_stale(state))
        yield
        sweep_task.cancel()
        await state.shutdown.finish()

    app = FastAPIOffline(  # serves the scripts of /docs itself: no other server learns of readers
        title="hyperlora",
        version=version("hyperlora"),
        summary="A photo, or an image before and after an edit, goes in; a LoRA comes out.",
        lifespan=run_lifespan,
    )
    for router_module in (loras, images, edits, similarity, jobs, system):
        app.include_router(router_module.router)
    install_handlers(app)
    add_problem_schema(app)
    app.add_middleware(
        BodyLimitMiddleware,
        max_form_bytes=settings.max_form_bytes,
        max_json_bytes=min(_MAX_OTHER_JSON_BYTES, settings.max_json_bytes),
        timeout_s=settings.body_timeout_s,
        max_bytes_by_path={images.router.prefix: settings.max_json_bytes},
    )
    app.state.auth = ApiKeyAuth(settings.key_digests, settings.rate_limit)
    app.add_middleware(AuthMiddleware, auth=app.state.auth)
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    return app


def _build_app_state(
    make_engine: EngineFactory, settings: ServiceSettings, metrics: Metrics
) -> AppState:
    files = FileStore(settings.state_dir / "files", settings.retention_s)
    make_private_dir(files.folder)
    engine = make_engine(metrics.observe_batch)
    jobs = Jobs(
        settings.state_dir / "jobs.sqlite",
        settings.max_jobs,
        metrics.count_job_state,
        max_jobs_per_owner=settings.max_jobs_per_owner,
    )
    metrics.connect_gauges(lambda: engine.queue_length, lambda: jobs.num_active)
    shutdown = Shutdown(engine, jobs, settings.drain_timeout_s)
    return AppState(settings, files, engine, jobs, metrics, shutdown)


async def _delete_stale(state: AppState) -> None:
    """Delete files and finished jobs whose time is over, again and again, also after an error."""
    sweeps: list[Callable[[], Awaitable[object]]] = [
        lambda: asyncio.to_thread(state.files.delete_stale),
        lambda: state.jobs.delete_stale(state.settings.retention_s),
    ]
    while True:
        for delete_stale in sweeps:
            try:
                await delete_stale()
            except Exception:
                state.metrics.sweep_errors.inc()
                _log.exception("what is out of date could not be deleted; it is tried again")
        await asyncio.sleep(state.settings.sweep_interval_s)
