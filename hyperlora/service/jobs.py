"""``Jobs``: accepted work that outlives its request, in a table that outlives the server."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from uuid import uuid4

from sqlalchemy import (
    Column,
    Float,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.engine import Engine as Database

from hyperlora.errors import HyperloraError
from hyperlora.service.engine.batcher import Expired, QueueFull

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
OPEN: Final = ("queued", "running")
STOPPED: Final = "the server stopped before this job was done: send it again"
_log = logging.getLogger("hyperlora.service")
_METADATA = MetaData()
_JOBS = Table(
    "jobs",
    _METADATA,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("state", String, nullable=False, index=True),
    Column("progress", Float, nullable=False),
    Column("created", Float, nullable=False),
    Column("finished", Float),
    Column("result", String),
    Column("error", String),
)
Report = Callable[[float], None]
"""Told, from any thread, which fraction is done."""


@dataclass(frozen=True)
class Job:
    """One row. ``progress`` 0 to 1; ``result`` is the id of a kept file; times are seconds since 1970."""

    id: str
    owner: str
    kind: str
    state: State
    progress: float
    created: float
    finished: float | None
    result: str | None
    error: str | None


class Jobs:
    """Runs accepted work as tasks of the running event loop.

    Opening the table reports what an earlier process accepted and did not finish as failed: photos are kept in memory
    only, so it cannot be done again. ``at_once`` jobs run together, the others are queued. ``observe`` is told of every
    change of state.
    """

    def __init__(
        self,
        file: Path,
        capacity: int,
        observe: Callable[[str, str], None] | None = None,
        *,
        per_owner: int | None = None,
        at_once: int = 8,
    ) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.capacity, self.per_owner = capacity, per_owner or capacity
        self._observe = observe or (lambda kind, state: None)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._owners: Counter[str] = Counter()
        self._turns = asyncio.Semaphore(at_once)
        self._stopping = self._leaving = False
        self._changed = asyncio.Condition()
        self._database = _opened(file)
        self._fail_open("the server stopped before this job was done, and photos live in memory only: send it again")

    def accept(self, kind: str, owner: str, work: Callable[[Report], Awaitable[str]]) -> Job:
        """Start ``work``, which returns the id of a kept file, and return at once. The job is in the table before.

        Raises ``QueueFull`` if as many jobs are open as may be, of all callers or of this one.
        """
        if len(self._tasks) >= self.capacity:
            raise QueueFull(f"{self.capacity} jobs are open already: ask again in a moment")
        if self._owners[owner] >= self.per_owner:
            raise QueueFull(f"you have {self.per_owner} open jobs already: wait for one of them")
        job = Job(uuid4().hex, owner, kind, "queued", 0.0, time.time(), None, None, None)
        with self._database.begin() as connection:
            connection.execute(insert(_JOBS).values(**job.__dict__))
        self._observe(kind, "queued")
        task = asyncio.create_task(self._run(job, work))
        self._tasks[job.id] = task
        self._owners[owner] += 1
        task.add_done_callback(lambda _: self._forget(job))
        return job

    def _forget(self, job: Job) -> None:
        self._tasks.pop(job.id, None)
        self._owners[job.owner] -= 1
        if not self._owners[job.owner]:
            del self._owners[job.owner]

    def sweep(self, seconds: float) -> None:
        """Forget jobs that were finished ``seconds`` ago."""
        with self._database.begin() as connection:
            connection.execute(delete(_JOBS).where(_JOBS.c.finished < time.time() - seconds))

    def get(self, id: str, owner: str) -> Job | None:
        """The job, if it is this owner's."""
        with self._database.connect() as connection:
            row = connection.execute(select(_JOBS).where(_JOBS.c.id == id, _JOBS.c.owner == owner)).mappings().first()
        return Job(**row) if row else None

    async def cancel(self, job: Job) -> Job:
        """The job after cancelling it; a finished one stays as it is."""
        if (task := self._tasks.get(job.id)) is not None:
            task.cancel()
            await asyncio.wait([task])
        return self.get(job.id, job.owner) or job

    async def follow(self, job: Job) -> AsyncIterator[Job]:
        """The job now and after every change, until it is finished or the server stops."""
        while (now := self.get(job.id, job.owner)) is not None:
            yield now
            if now.state not in OPEN:
                return
            async with self._changed:
                while self.get(job.id, job.owner) == now:
                    if self._leaving:
                        return
                    await self._changed.wait()

    async def dismiss(self) -> None:
        """End every ``follow``: an open stream would hold a server that stops."""
        self._leaving = True
        async with self._changed:
            self._changed.notify_all()

    @property
    def open(self) -> int:
        with self._database.connect() as connection:
            count = connection.scalar(select(func.count()).select_from(_JOBS).where(_JOBS.c.state.in_(OPEN)))
        return int(count or 0)

    async def drain(self, seconds: float) -> None:
        """Let open jobs finish; after ``seconds``, report those that did not as failed."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=seconds)
        self._stopping = True
        for task in list(self._tasks.values()):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))
        self._fail_open(STOPPED)
        self._database.dispose()

    async def _run(self, job: Job, work: Callable[[Report], Awaitable[str]]) -> None:
        try:
            async with self._turns:
                await self._set(job, state="running")
                result = await work(self._reporter(job))
            await self._set(job, state="succeeded", progress=1.0, result=result, finished=time.time())
        except asyncio.CancelledError:
            if self._stopping:
                await self._set(job, state="failed", error=STOPPED, finished=time.time())
            else:
                await self._set(job, state="cancelled", error="cancelled on request", finished=time.time())
        except (HyperloraError, QueueFull, Expired) as error:
            await self._set(job, state="failed", error=str(error), finished=time.time())
        except Exception:
            _log.exception("a job failed unexpectedly")
            await self._set(job, state="failed", error="the server made a mistake; it is logged", finished=time.time())

    def _reporter(self, job: Job) -> Report:
        loop, last = asyncio.get_running_loop(), 0.0

        def report(progress: float) -> None:
            nonlocal last
            if progress >= last + 0.05:  # each is a write to the disk
                last = progress
                asyncio.run_coroutine_threadsafe(self._set(job, state="running", progress=progress), loop)

        return report

    async def _set(self, job: Job, **values: object) -> None:
        with self._database.begin() as connection:
            known = _JOBS.c.state.in_(OPEN)  # what is finished stays as it is
            connection.execute(update(_JOBS).where(_JOBS.c.id == job.id, known).values(**values))
        self._observe(job.kind, str(values["state"]))
        async with self._changed:
            self._changed.notify_all()

    def _fail_open(self, reason: str) -> None:
        with self._database.begin() as connection:
            values = {"state": "failed", "error": reason, "finished": time.time()}
            connection.execute(update(_JOBS).where(_JOBS.c.state.in_(OPEN)).values(**values))


def _opened(file: Path) -> Database:
    database = create_engine(f"sqlite:///{file}", connect_args={"check_same_thread": False})

    @event.listens_for(database, "connect")
    def durable(connection: object, _: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    _METADATA.create_all(database)
    return database
