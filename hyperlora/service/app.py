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
from hyperlora.service.errors import add_handlers, document_problems
from hyperlora.service.file_store import Files
from hyperlora.service.jobs import Jobs
from hyperlora.service.metrics import Metrics, Observed
from hyperlora.service.security import BodyLimits, Gate, Guard
from hyperlora.service.settings import ServiceSettings
from hyperlora.service.state import Service

Observe = Callable[[str, int], None]


def create_app(make_engine: Callable[[Observe], Engine], settings: ServiceSettings) -> FastAPI:
    """The app. ``make_engine`` is called when the server starts, with what it should tell of its batches."""
    MultiPartParser.spool_max_size = settings.max_body  # photos never touch the disk

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = _service(make_engine, settings)
        app.state.service = service
        sweeping = asyncio.create_task(_sweep(service))
        yield
        sweeping.cancel()
        await service.jobs.drain(settings.drain_seconds)
        await asyncio.to_thread(service.engine.close, 10.0)

    app = FastAPIOffline(  # /docs with its scripts from here: a page about this server tells no other of its readers
        title="hyperlora",
        version=version("hyperlora"),
        summary="A photo, or a picture before and after an edit, goes in; a LoRA comes out.",
        lifespan=lifespan,
    )
    for room in (loras, images, edits, similarity, jobs, system):
        app.include_router(room.router)
    add_handlers(app)
    document_problems(app)
    app.add_middleware(BodyLimits, form=settings.max_body, other=settings.max_json, seconds=settings.body_seconds)
    app.add_middleware(Guard, gate=Gate(settings.keys, settings.rate))
    app.add_middleware(Observed, metrics=lambda: app.state.service.metrics)
    return app


def _service(make_engine: Callable[[Observe], Engine], settings: ServiceSettings) -> Service:
    files = Files(settings.state / "files", settings.keep_seconds)
    held: list[Service] = []
    metrics = Metrics(lambda: held[0].engine.waiting, lambda: held[0].jobs.open)
    engine = make_engine(lambda work, size: metrics.batches.labels(work).observe(size))
    jobs = Jobs(
        settings.state / "jobs.sqlite", settings.jobs, lambda kind, state: metrics.jobs.labels(kind, state).inc(),
        per_owner=settings.jobs_per_owner,
    )  # fmt: skip
    held.append(Service(settings, files, engine, jobs, metrics))
    return held[0]


async def _sweep(service: Service) -> None:
    """Files and finished jobs go when their time is over."""
    while True:
        await asyncio.to_thread(service.files.sweep)
        service.jobs.sweep(service.settings.keep_seconds)
        await asyncio.sleep(service.settings.sweep_seconds)
