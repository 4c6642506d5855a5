"""``create_app``: the FastAPI application over an engine."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.formparsers import MultiPartParser

from hyperlora.service.api import edits, images, jobs, loras, similarity, system
from hyperlora.service.engine.base import Engine
from hyperlora.service.errors import add_problem_schema, install_handlers
from hyperlora.service.file_store import FileStore
from hyperlora.service.jobs import Jobs
from hyperlora.service.metrics import Metrics, MetricsMiddleware
from hyperlora.service.security import ApiKeyAuth, AuthMiddleware, BodyLimitMiddleware
from hyperlora.service.settings import ServiceSettings
from hyperlora.service.state import AppState

BatchCallback = Callable[[str, int], None]


def create_app(
    make_engine: Callable[[BatchCallback], Engine], settings: ServiceSettings
) -> FastAPI:
    """The app. ``make_engine`` is called when the server starts, with what it should tell of its batches."""
    MultiPartParser.spool_max_size = settings.max_form_bytes  # photos never touch the disk

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state = _build_app_state(make_engine, settings)
        app.state.service = state
        sweep_task = asyncio.create_task(_delete_stale(state))
        yield
        sweep_task.cancel()
        await state.jobs.drain(settings.drain_timeout_s)
        await asyncio.to_thread(state.engine.close, 10.0)

    app = FastAPIOffline(  # /docs with its scripts from here: a page about this server tells no other of its readers
        title="hyperlora",
        version=version("hyperlora"),
        summary="A photo, or a picture before and after an edit, goes in; a LoRA comes out.",
        lifespan=lifespan,
    )
    for router_module in (loras, images, edits, similarity, jobs, system):
        app.include_router(router_module.router)
    install_handlers(app)
    add_problem_schema(app)
    app.add_middleware(
        BodyLimitMiddleware,
        form=settings.max_form_bytes,
        other=settings.max_json_bytes,
        seconds=settings.body_timeout_s,
    )
    app.add_middleware(AuthMiddleware, gate=ApiKeyAuth(settings.key_digests, settings.rate_limit))
    app.add_middleware(MetricsMiddleware, metrics=lambda: app.state.service.metrics)
    return app


def _build_app_state(
    make_engine: Callable[[BatchCallback], Engine], settings: ServiceSettings
) -> AppState:
    files = FileStore(settings.state_dir / "files", settings.retention_s)
    state_ref: list[AppState] = []
    metrics = Metrics(
        lambda: state_ref[0].engine.queue_length, lambda: state_ref[0].jobs.num_active
    )
    engine = make_engine(lambda work, size: metrics.batch_sizes.labels(work).observe(size))
    jobs = Jobs(
        settings.state_dir / "jobs.sqlite",
        settings.max_jobs,
        lambda kind, state: metrics.jobs.labels(kind, state).inc(),
        max_jobs_per_owner=settings.max_jobs_per_owner,
    )
    state_ref.append(AppState(settings, files, engine, jobs, metrics))
    return state_ref[0]


async def _delete_stale(state: AppState) -> None:
    """Files and finished jobs go when their time is over."""
    while True:
        await asyncio.to_thread(state.files.delete_stale)
        state.jobs.delete_stale(state.settings.retention_s)
        await asyncio.sleep(state.settings.sweep_interval_s)
