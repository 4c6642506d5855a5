"""``Jobs``: accepted work that outlives its request, in a table that outlives the process."""

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
from hyperlora.service.engine.callbacks import ProgressFn
from hyperlora.service.file_store import make_private_file

JobKind = Literal["lora", "image"]
JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
JobFn = Callable[[ProgressFn], Awaitable[str]]
"""Runs a job and returns the id of the stored file."""
ACTIVE_STATES: Final = ("queued", "running")
SERVER_STOPPED: Final = "the server stopped before this job was done: send it again"
_SERVER_KILLED: Final = (
    "the server stopped before this job was done, and photos live in memory only: send it again"
)
_MIN_PROGRESS_STEP: Final = 0.05
"""Progress is written in steps of at least this: each is a write to the disk."""
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


@dataclass(frozen=True)
class Job:
    """One row of the job table.

    Attributes:
        id: 32 hexadecimal digits.
        owner: Who may see the job.
        kind: What the job makes.
        state: Where the job stands.
        progress: Fraction that is done, 0 to 1.
        created: Seconds since 1970.
        finished: Seconds since 1970; None while the job is active.
        result: Id of the stored file, once there is one.
        error: Why the job failed, in one sentence.
    """

    id: str
    owner: str
    kind: JobKind
    state: JobState
    progress: float
    created: float
    finished: float | None
    result: str | None
    error: str | None


class Jobs:
    """Run accepted work as tasks of the running event loop.

    Opening the table reports what an earlier process accepted and did not finish as failed.
    Photos are in memory only, so such a job cannot run again.

    Args:
        database_path: SQLite file of the job table.
        max_jobs: Jobs that may be active.
        on_state_change: Receives the kind and the new state of a job at every change.
        max_jobs_per_owner: Active jobs of one owner; None for ``max_jobs``.
        max_concurrent: Jobs that run together; others are queued.
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
        make_private_file(database_path)  # SQLite gives its other files the same mode
        self.max_jobs, self.max_jobs_per_owner = max_jobs, max_jobs_per_owner or max_jobs
        self._on_state_change = on_state_change or (lambda kind, state: None)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._jobs_per_owner: Counter[str] = Counter()
        self._run_slots = asyncio.Semaphore(max_concurrent)
        self._stopping = self._streams_closed = False
        self._state_changed = asyncio.Condition()
        self._database = _open_database(database_path)
        self._fail_active(_SERVER_KILLED)

    def submit(self, kind: JobKind, owner: str, run_fn: JobFn) -> Job:
        """Start a job and return at once; the job is in the table before it starts.

        Args:
            kind: What the job makes.
            owner: Who may see the job.
            run_fn: Runs the job; it receives a function that reports progress.

        Returns:
            The job, queued.

        Raises:
            QueueFullError: If too many jobs are active, of all owners or of this one.
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
        """Delete jobs that finished more than ``retention_s`` seconds ago."""
        with self._database.begin() as connection:
            connection.execute(delete(_JOBS).where(_JOBS.c.finished < time.time() - retention_s))

    def get(self, id: str, owner: str) -> Job | None:
        """Read a job.

        Args:
            id: Id of the job.
            owner: Who asks.

        Returns:
            The job, or None if this owner has no such job.
        """
        query = select(_JOBS).where(_JOBS.c.id == id, _JOBS.c.owner == owner)
        with self._database.connect() as connection:
            row = connection.execute(query).mappings().first()
        return Job(**row) if row else None

    async def cancel(self, job: Job) -> Job:
        """Cancel a job and return it as it is then; a finished job stays as it is."""
        if (task := self._tasks.get(job.id)) is not None:
            task.cancel()
            await asyncio.wait([task])
        return self.get(job.id, job.owner) or job

    async def stream(self, job: Job) -> AsyncIterator[Job]:
        """Yield the job now and after every change, until it is finished or the server stops."""
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
        """End every ``stream``; an open stream would keep the server from stopping."""
        self._streams_closed = True
        async with self._state_changed:
            self._state_changed.notify_all()

    @property
    def num_active(self) -> int:
        """Number of jobs that are not finished."""
        with self._database.connect() as connection:
            count = connection.scalar(
                select(func.count()).select_from(_JOBS).where(_JOBS.c.state.in_(ACTIVE_STATES))
            )
        return int(count or 0)

    async def drain(self, timeout_s: float) -> None:
        """Let active jobs finish; after ``timeout_s`` seconds report the others as failed."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=timeout_s)
        self._stopping = True
        for task in list(self._tasks.values()):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))
        self._fail_active(SERVER_STOPPED)
        self._database.dispose()

    async def _run_job(self, job: Job, run_fn: JobFn) -> None:
        try:
            async with self._run_slots:
                await self._update_job(job, state="running")
                result = await run_fn(self._make_progress_fn(job))
            await self._update_job(
                job, state="succeeded", progress=1.0, result=result, finished=time.time()
            )
        except asyncio.CancelledError:
            if self._stopping:
                await self._finish_job(job, "failed", SERVER_STOPPED)
            else:
                await self._finish_job(job, "cancelled", "cancelled on request")
        except (HyperloraError, QueueFullError, DeadlineExceededError) as error:
            await self._finish_job(job, "failed", str(error))
        except Exception:
            _log.exception("a job failed unexpectedly")
            await self._finish_job(job, "failed", "the server made a mistake; it is logged")

    async def _finish_job(self, job: Job, state: JobState, error: str) -> None:
        await self._update_job(job, state=state, error=error, finished=time.time())

    def _make_progress_fn(self, job: Job) -> ProgressFn:
        loop, last_progress = asyncio.get_running_loop(), 0.0

        def report_progress(progress: float) -> None:
            nonlocal last_progress
            if progress >= last_progress + _MIN_PROGRESS_STEP:
                last_progress = progress
                asyncio.run_coroutine_threadsafe(
                    self._update_job(job, state="running", progress=progress), loop
                )

        return report_progress

    async def _update_job(self, job: Job, **values: object) -> None:
        with self._database.begin() as connection:
            is_active = _JOBS.c.state.in_(ACTIVE_STATES)  # a finished job stays as it is
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
