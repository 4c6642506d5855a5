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
from hyperlora.service.engine.batcher import DeadlineExceededError, QueueFullError

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
ACTIVE_STATES: Final = ("queued", "running")
SERVER_STOPPED: Final = "the server stopped before this job was done: send it again"
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
ProgressFn = Callable[[float], None]
"""Told, from any thread, which fraction is done."""


@dataclass(frozen=True)
class Job:
    """One row. ``progress`` 0 to 1; ``result`` is the id of a kept file; times are seconds since 1970."""

    id: str
    owner: str
    kind: str
    state: JobState
    progress: float
    created: float
    finished: float | None
    result: str | None
    error: str | None


class Jobs:
    """Runs accepted work as tasks of the running event loop.

    Opening the table reports what an earlier process accepted and did not finish as failed: photos are kept in memory
    only, so it cannot be done again. ``max_concurrent`` jobs run together, the others are queued. ``on_state_change`` is told of every
    change of state.
    """

    def __init__(
        self,
        database_path: Path,
        max_jobs: int,
        on_state_change: Callable[[str, str], None] | None = None,
        *,
        max_jobs_per_owner: int | None = None,
        max_concurrent: int = 8,
    ) -> None:
        database_path.parent.mkdir(parents=True, exist_ok=True)
        self.max_jobs, self.max_jobs_per_owner = max_jobs, max_jobs_per_owner or max_jobs
        self._on_state_change = on_state_change or (lambda kind, state: None)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._jobs_per_owner: Counter[str] = Counter()
        self._run_slots = asyncio.Semaphore(max_concurrent)
        self._stopping = self._streams_closed = False
        self._state_changed = asyncio.Condition()
        self._database = _open_database(database_path)
        self._fail_active(
            "the server stopped before this job was done, and photos live in memory only: send it again"
        )

    def submit(self, kind: str, owner: str, run_fn: Callable[[ProgressFn], Awaitable[str]]) -> Job:
        """Start ``run_fn``, which returns the id of a kept file, and return at once. The job is in the table before.

        Raises ``QueueFullError`` if as many jobs are open as may be, of all callers or of this one.
        """
        if len(self._tasks) >= self.max_jobs:
            raise QueueFullError(f"{self.max_jobs} jobs are open already: ask again in a moment")
        if self._jobs_per_owner[owner] >= self.max_jobs_per_owner:
            raise QueueFullError(
                f"you have {self.max_jobs_per_owner} open jobs already: wait for one of them"
            )
        job = Job(uuid4().hex, owner, kind, "queued", 0.0, time.time(), None, None, None)
        with self._database.begin() as connection:
            connection.execute(insert(_JOBS).values(**job.__dict__))
        self._on_state_change(kind, "queued")
        task = asyncio.create_task(self._run_job(job, run_fn))
        self._tasks[job.id] = task
        self._jobs_per_owner[owner] += 1
        task.add_done_callback(lambda _: self._remove_task(job))
        return job

    def _remove_task(self, job: Job) -> None:
        self._tasks.pop(job.id, None)
        self._jobs_per_owner[job.owner] -= 1
        if not self._jobs_per_owner[job.owner]:
            del self._jobs_per_owner[job.owner]

    def delete_stale(self, retention_s: float) -> None:
        """Forget jobs that were finished ``seconds`` ago."""
        with self._database.begin() as connection:
            connection.execute(delete(_JOBS).where(_JOBS.c.finished < time.time() - retention_s))

    def get(self, id: str, owner: str) -> Job | None:
        """The job, if it is this owner's."""
        with self._database.connect() as connection:
            row = (
                connection.execute(select(_JOBS).where(_JOBS.c.id == id, _JOBS.c.owner == owner))
                .mappings()
                .first()
            )
        return Job(**row) if row else None

    async def cancel(self, job: Job) -> Job:
        """The job after cancelling it; a finished one stays as it is."""
        if (task := self._tasks.get(job.id)) is not None:
            task.cancel()
            await asyncio.wait([task])
        return self.get(job.id, job.owner) or job

    async def stream(self, job: Job) -> AsyncIterator[Job]:
        """The job now and after every change, until it is finished or the server stops."""
        while (current := self.get(job.id, job.owner)) is not None:
            yield current
            if current.state not in ACTIVE_STATES:
                return
            async with self._state_changed:
                while self.get(job.id, job.owner) == current:
                    if self._streams_closed:
                        return
                    await self._state_changed.wait()

    async def close_streams(self) -> None:
        """End every ``stream``: an open stream would hold a server that stops."""
        self._streams_closed = True
        async with self._state_changed:
            self._state_changed.notify_all()

    @property
    def num_active(self) -> int:
        with self._database.connect() as connection:
            count = connection.scalar(
                select(func.count()).select_from(_JOBS).where(_JOBS.c.state.in_(ACTIVE_STATES))
            )
        return int(count or 0)

    async def drain(self, timeout_s: float) -> None:
        """Let open jobs finish; after ``seconds``, report those that did not as failed."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=timeout_s)
        self._stopping = True
        for task in list(self._tasks.values()):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))
        self._fail_active(SERVER_STOPPED)
        self._database.dispose()

    async def _run_job(self, job: Job, run_fn: Callable[[ProgressFn], Awaitable[str]]) -> None:
        try:
            async with self._run_slots:
                await self._update_job(job, state="running")
                result = await run_fn(self._make_progress_fn(job))
            await self._update_job(
                job, state="succeeded", progress=1.0, result=result, finished=time.time()
            )
        except asyncio.CancelledError:
            if self._stopping:
                await self._update_job(
                    job, state="failed", error=SERVER_STOPPED, finished=time.time()
                )
            else:
                await self._update_job(
                    job, state="cancelled", error="cancelled on request", finished=time.time()
                )
        except (HyperloraError, QueueFullError, DeadlineExceededError) as error:
            await self._update_job(job, state="failed", error=str(error), finished=time.time())
        except Exception:
            _log.exception("a job failed unexpectedly")
            await self._update_job(
                job,
                state="failed",
                error="the server made a mistake; it is logged",
                finished=time.time(),
            )

    def _make_progress_fn(self, job: Job) -> ProgressFn:
        loop, last = asyncio.get_running_loop(), 0.0

        def report_progress(progress: float) -> None:
            nonlocal last
            if progress >= last + 0.05:  # each is a write to the disk
                last = progress
                asyncio.run_coroutine_threadsafe(
                    self._update_job(job, state="running", progress=progress), loop
                )

        return report_progress

    async def _update_job(self, job: Job, **values: object) -> None:
        with self._database.begin() as connection:
            is_active = _JOBS.c.state.in_(ACTIVE_STATES)  # what is finished stays as it is
            connection.execute(
                update(_JOBS).where(_JOBS.c.id == job.id, is_active).values(**values)
            )
        self._on_state_change(job.kind, str(values["state"]))
        async with self._state_changed:
            self._state_changed.notify_all()

    def _fail_active(self, reason: str) -> None:
        with self._database.begin() as connection:
            values = {"state": "failed", "error": reason, "finished": time.time()}
            connection.execute(
                update(_JOBS).where(_JOBS.c.state.in_(ACTIVE_STATES)).values(**values)
            )


def _open_database(path: Path) -> Database:
    database = create_engine(f"sqlite:///{path}", connect_args={"check_same_thread": False})

    @event.listens_for(database, "connect")
    def set_pragmas(connection: object, _: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    _METADATA.create_all(database)
    return database
