"""``Jobs``: accepted work that outlives its request, in a table that outlives the process."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import uuid4

from hyperlora.errors import HyperloraError
from hyperlora.service.engine.batcher import (
    DeadlineExceededError,
    OwnerQueueFullError,
    QueueFullError,
    ServerStoppingError,
)
from hyperlora.service.engine.callbacks import ProgressFn
from hyperlora.service.file_store import StorageError
from hyperlora.service.job_table import Job, JobKind, JobTable

ValueT = TypeVar("ValueT")
JobFn = Callable[[ProgressFn], Awaitable[str]]
"""Runs a job and returns the id of the stored file."""
SERVER_STOPPED: Final = "the server stopped before this job was done: send it again"
_SERVER_KILLED: Final = (
    "the server stopped before this job was done, and photos live in memory only: send it again"
)
_CANCELLED: Final = "cancelled on request"
_MIN_PROGRESS_STEP: Final = 0.05
"""Progress is told in steps of at least this."""
_SAVE_TIMEOUT_S: Final = 0.5
"""Seconds that writes may take when the server stops."""
_log = logging.getLogger("hyperlora.service")


@dataclass
class _OwnerJobs:
    """The active jobs of one owner.

    Attributes:
        run_slots: One slot for each job that may run.
        num_active: Jobs that are not finished.
    """

    run_slots: asyncio.Semaphore
    num_active: int = 0


class Jobs:
    """Run accepted work as tasks of the running event loop.

    Active jobs are in memory; the table, which a thread of its own writes, holds what was accepted
    and how it ended. An end that the disk does not take stays in memory until it does.

    Opening the table reports what an earlier process accepted and did not finish as failed.
    Photos are in memory only, so such a job cannot run again.

    Args:
        database_path: SQLite file of the job table.
        max_jobs: Jobs that may be active.
        on_state_change: Receives the kind and the new state of a job at every change.
        max_jobs_per_owner: Active jobs of one owner; None for ``max_jobs``.
        max_running_per_owner: Jobs of one owner that run together; others of this owner wait, and
            never those of another.
        retry_interval_s: Seconds until a write that failed is repeated.
    """

    def __init__(
        self,
        database_path: Path,
        max_jobs: int,
        on_state_change: Callable[[str, str], None] | None = None,
        *,
        max_jobs_per_owner: int | None = None,
        max_running_per_owner: int = 8,
        retry_interval_s: float = 5.0,
    ) -> None:
        self.max_jobs, self.max_jobs_per_owner = max_jobs, max_jobs_per_owner or max_jobs
        self.retry_interval_s = retry_interval_s
        self._on_state_change = on_state_change or (lambda kind, state: None)
        self._jobs: dict[str, Job] = {}  # active, or not yet written
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._save_tasks: set[asyncio.Task[None]] = set()
        self._owners = defaultdict[str, _OwnerJobs](
            lambda: _OwnerJobs(asyncio.Semaphore(max_running_per_owner))
        )
        self._num_active = 0
        self._stopping = self._streams_closed = False
        self._changed = asyncio.Event()
        self._table = JobTable(database_path)
        self._table_thread = ThreadPoolExecutor(1, "hyperlora-jobs")
        self._table.fail_active(_SERVER_KILLED)

    @property
    def num_active(self) -> int:
        """Number of jobs that are not finished."""
        return self._num_active

    async def submit(self, kind: JobKind, owner: str, run_fn: JobFn) -> Job:
        """Start a job and return at once; the job is in the table before it starts.

        Args:
            kind: What the job makes.
            owner: Who may see the job.
            run_fn: Runs the job; it receives a function that reports progress.

        Returns:
            The job, queued.

        Raises:
            QueueFullError: If too many jobs are active, of all owners or of this one.
            StorageError: If the disk does not take the job.
        """
        if self._num_active >= self.max_jobs:
            raise QueueFullError(f"{self.max_jobs} jobs are open already: ask again in a moment")
        if self._owners[owner].num_active >= self.max_jobs_per_owner:
            raise OwnerQueueFullError(
                f"you have {self.max_jobs_per_owner} open jobs already: wait for one of them"
            )
        job = Job(uuid4().hex, owner, kind, "queued", 0.0, time.time(), None, None, None)
        self._count_active(owner, 1)
        try:
            await self._call_table(self._table.insert, job)
            if self._stopping:
                raise ServerStoppingError
        except BaseException:
            self._count_active(owner, -1)
            raise
        self._set_job(job)
        task = asyncio.create_task(self._run_job(job, run_fn))
        self._tasks[job.id] = task
        task.add_done_callback(lambda task: self._end_task(job, task))
        return job

    async def delete_stale(self, retention_s: float) -> None:
        """Delete jobs that finished more than ``retention_s`` seconds ago."""
        await self._call_table(self._table.delete_stale, retention_s)

    async def get(self, id: str, owner: str) -> Job | None:
        """Find a job.

        Args:
            id: Id of the job.
            owner: Who asks.

        Returns:
            The job, or None if this owner has no such job.
        """
        if (job := self._jobs.get(id)) is not None:
            return job if job.owner == owner else None
        return await self._call_table(self._table.get, id, owner)

    async def cancel(self, job: Job) -> Job:
        """Cancel a job and return it as it is then; a finished job stays as it is."""
        if (task := self._tasks.get(job.id)) is not None:
            task.cancel()
            await asyncio.wait([task])
        return await self.get(job.id, job.owner) or job

    async def stream(self, job: Job) -> AsyncIterator[Job]:
        """Yield the job now and after every change, until it is finished or the server stops."""
        while (current := await self.get(job.id, job.owner)) is not None:
            yield current
            if not current.is_active:
                return
            while self._jobs.get(job.id) == current:
                if self._streams_closed:
                    return
                await self._changed.wait()

    def close_streams(self) -> None:
        """End every ``stream``; an open stream would keep the server from stopping."""
        self._streams_closed = True
        self._notify()

    async def drain(self, timeout_s: float) -> None:
        """Let active jobs finish; after ``timeout_s`` seconds report the others as failed."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=timeout_s)
        self._stopping = True
        for task in list(self._tasks.values()):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))
        if self._save_tasks:
            _, unsaved = await asyncio.wait(self._save_tasks, timeout=_SAVE_TIMEOUT_S)
            for task in unsaved:
                task.cancel()
        self._table_thread.shutdown(wait=False, cancel_futures=True)
        self._table.close()

    async def _run_job(self, job: Job, run_fn: JobFn) -> None:
        async with self._owners[job.owner].run_slots:
            self._set_job(replace(job, state="running"))
            try:
                result = await run_fn(self._make_progress_fn(job))
                self._finish_job(job, state="succeeded", progress=1.0, result=result)
            except ServerStoppingError:
                self._finish_job(job, state="failed", error=SERVER_STOPPED)
            except (HyperloraError, QueueFullError, DeadlineExceededError, StorageError) as error:
                self._finish_job(job, state="failed", error=str(error))
            except Exception:
                _log.exception("a job failed unexpectedly")
                error_text = "the server made a mistake; it is logged"
                self._finish_job(job, state="failed", error=error_text)

    def _end_task(self, job: Job, task: "asyncio.Task[None]") -> None:
        """Account for a task that is done, perhaps cancelled before it began."""
        del self._tasks[job.id]
        if task.cancelled() and self._stopping:
            self._finish_job(job, state="failed", error=SERVER_STOPPED)
        elif task.cancelled():
            self._finish_job(job, state="cancelled", error=_CANCELLED)

    def _count_active(self, owner: str, change: int) -> None:
        self._num_active += change
        self._owners[owner].num_active += change
        if not self._owners[owner].num_active:
            del self._owners[owner]

    def _make_progress_fn(self, job: Job) -> ProgressFn:
        loop, last_progress = asyncio.get_running_loop(), 0.0

        def report_progress(progress: float) -> None:
            nonlocal last_progress
            if progress >= last_progress + _MIN_PROGRESS_STEP:
                last_progress = progress
                loop.call_soon_threadsafe(self._set_progress, job.id, progress)

        return report_progress

    def _set_progress(self, id: str, progress: float) -> None:
        if (job := self._jobs.get(id)) is not None and job.is_active:
            self._jobs[id] = replace(job, progress=progress)
            self._notify()

    def _finish_job(self, job: Job, **values: Any) -> None:
        """Set the end of a job in memory, and write it in the background."""
        job = replace(self._jobs.get(job.id, job), finished=time.time(), **values)
        self._count_active(job.owner, -1)
        self._set_job(job)
        task = asyncio.create_task(self._save_job(job))
        self._save_tasks.add(task)
        task.add_done_callback(self._save_tasks.discard)

    async def _save_job(self, job: Job) -> None:
        """Write the end of a job; repeat it until the disk takes it."""
        while True:
            try:
                await self._call_table(self._table.update, job)
            except StorageError as error:
                _log.warning("the end of a job is not written yet: %s", error.__cause__)
                await asyncio.sleep(self.retry_interval_s)
            else:
                self._jobs.pop(job.id, None)
                return

    def _set_job(self, job: Job) -> None:
        self._jobs[job.id] = job
        self._on_state_change(job.kind, job.state)
        self._notify()

    def _notify(self) -> None:
        """Wake every stream."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _call_table(self, method: Callable[..., ValueT], *args: object) -> ValueT:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._table_thread, method, *args)
