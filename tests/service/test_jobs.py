"""The job table: after a kill, at a stop, and per owner."""

import asyncio
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hyperlora.service.engine.batcher import OwnerQueueFullError
from hyperlora.service.engine.callbacks import ProgressFn
from hyperlora.service.file_store import StorageError
from hyperlora.service.job_table import Job, JobTable
from hyperlora.service.jobs import Jobs

_SUBMIT_JOBS = """
import asyncio, sys
from pathlib import Path
from hyperlora.service.jobs import Jobs

async def run_forever(on_progress):
    await asyncio.sleep(1000)

async def run_briefly(on_progress):
    on_progress(0.5)
    return "file"

async def main():
    jobs = Jobs(Path(sys.argv[1]), 50)
    first = await jobs.submit("lora", "me", run_briefly)
    async for job in jobs.stream(first):
        pass
    ids = [first.id]
    ids += [(await jobs.submit("lora", "me", run_forever)).id for _ in range(20)]
    print(*ids, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


async def run_briefly(on_progress: ProgressFn) -> str:
    return "file"


def get_job(database_path: Path, id: str) -> Job:
    """Read a job as the next process would."""
    job = JobTable(database_path).get(id, "me")
    assert job is not None
    return job


def test_jobs_report_all_active_ones_after_a_kill(tmp_path: Path) -> None:
    database_path = tmp_path / "jobs.sqlite"
    with subprocess.Popen(
        [sys.executable, "-c", _SUBMIT_JOBS, str(database_path)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        ids = server.stdout.readline().split()
        server.kill()

    async def restart() -> None:
        jobs = Jobs(database_path, 50)
        found = [await jobs.get(id, "me") for id in ids]
        assert [job.state for job in found if job] == ["succeeded"] + ["failed"] * 20
        assert all("send it again" in str(job.error) for job in found[1:] if job)
        assert await jobs.get(ids[0], "you") is None

    asyncio.run(restart())


def test_jobs_drain_waits_for_active_ones(tmp_path: Path) -> None:
    database_path = tmp_path / "jobs.sqlite"

    async def run_slowly(on_progress: ProgressFn) -> str:
        await asyncio.sleep(0.2)
        return "file"

    async def stop() -> str:
        jobs = Jobs(database_path, 50)
        id = (await jobs.submit("lora", "me", run_slowly)).id
        await asyncio.sleep(0.01)
        await jobs.drain(5)
        return get_job(database_path, id).state

    assert asyncio.run(stop()) == "succeeded"


def test_jobs_drain_fails_those_that_run_too_long(tmp_path: Path) -> None:
    database_path = tmp_path / "jobs.sqlite"

    async def run_forever(on_progress: ProgressFn) -> str:
        await asyncio.sleep(100)
        return ""

    async def stop() -> list[Job]:
        jobs = Jobs(database_path, 50, max_running_per_owner=1)
        ids = [
            (await jobs.submit("lora", "me", run_forever)).id for _ in range(2)
        ]  # one runs, one waits
        await asyncio.sleep(0.05)
        await jobs.drain(0.1)
        return [get_job(database_path, id) for id in ids]

    for job in asyncio.run(stop()):
        assert (job.state, job.error) == (
            "failed",
            "the server stopped before this job was done: send it again",
        )


def test_jobs_limit_owners_and_delete_stale_ones(tmp_path: Path) -> None:
    async def run() -> None:
        jobs = Jobs(tmp_path / "jobs.sqlite", 50, max_jobs_per_owner=1)
        first = await jobs.submit("lora", "me", run_briefly)
        with pytest.raises(OwnerQueueFullError, match="you have 1 open"):
            await jobs.submit("lora", "me", run_briefly)
        await jobs.submit("lora", "you", run_briefly)
        async for _ in jobs.stream(first):
            pass
        await jobs.submit("lora", "me", run_briefly)
        await jobs.delete_stale(100)
        assert await jobs.get(first.id, "me") is not None
        await jobs.delete_stale(0)
        assert await jobs.get(first.id, "me") is None

    asyncio.run(run())


def test_jobs_close_streams_ends_them_and_finishes_their_jobs(tmp_path: Path) -> None:
    database_path = tmp_path / "jobs.sqlite"

    async def run_slowly(on_progress: ProgressFn) -> str:
        await asyncio.sleep(0.3)
        return "file"

    async def list_states(jobs: Jobs, job: Job) -> list[str]:
        return [update.state async for update in jobs.stream(job)]

    async def stop() -> tuple[list[str], str]:
        jobs = Jobs(database_path, 50)
        job = await jobs.submit("lora", "me", run_slowly)
        stream_task = asyncio.create_task(list_states(jobs, job))
        await asyncio.sleep(0.05)
        jobs.close_streams()
        states = await asyncio.wait_for(stream_task, 0.1)
        await jobs.drain(5)
        return states, get_job(database_path, job.id).state

    states, final_state = asyncio.run(stop())
    assert states[-1] in ("queued", "running")
    assert final_state == "succeeded"


def test_jobs_of_one_owner_never_wait_for_those_of_another(tmp_path: Path) -> None:
    async def run_forever(on_progress: ProgressFn) -> str:
        await asyncio.sleep(100)
        return ""

    async def run() -> None:
        jobs = Jobs(tmp_path / "jobs.sqlite", 50, max_running_per_owner=2)
        mine = [await jobs.submit("lora", "me", run_forever) for _ in range(20)]
        yours = await jobs.submit("lora", "you", run_briefly)
        states = [job.state async for job in jobs.stream(yours)]
        assert states[-1] == "succeeded"
        found = [await jobs.get(job.id, "me") for job in mine]
        assert [job.state for job in found if job] == ["running"] * 2 + ["queued"] * 18
        await jobs.drain(0)

    asyncio.run(run())


class FullDisk:
    """Makes the writes of a job table fail while it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = True
        for name in ("insert", "update"):
            monkeypatch.setattr(JobTable, name, self._make_write(getattr(JobTable, name)))

    def _make_write(self, write: Callable[[JobTable, Job], None]) -> Callable[..., None]:
        def write_or_fail(table: JobTable, job: Job) -> None:
            if self.is_full:
                raise StorageError
            write(table, job)

        return write_or_fail


def test_jobs_write_their_end_when_the_disk_has_space_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database_path = tmp_path / "jobs.sqlite"

    async def run() -> None:
        jobs = Jobs(database_path, 50, retry_interval_s=0.05)
        disk = FullDisk(monkeypatch)
        with pytest.raises(StorageError, match="is full"):
            await jobs.submit("lora", "me", run_briefly)
        assert jobs.num_active == 0, "a job that is refused takes no place"
        disk.is_full = False
        job = await jobs.submit("lora", "me", run_briefly)
        disk.is_full = True
        async for _ in jobs.stream(job):
            pass
        found = await jobs.get(job.id, "me")
        assert found is not None and found.state == "succeeded", "told also while it is full"
        assert get_job(database_path, job.id).state == "queued" and jobs.num_active == 0
        disk.is_full = False
        await asyncio.sleep(0.3)
        assert get_job(database_path, job.id) == found
        await jobs.drain(0)

    asyncio.run(run())


def test_jobs_keep_the_event_loop_free_while_the_table_is_locked(tmp_path: Path) -> None:
    database_path = tmp_path / "jobs.sqlite"

    async def run() -> float:
        jobs = Jobs(database_path, 50)
        other_program = sqlite3.connect(database_path)
        other_program.execute("BEGIN EXCLUSIVE")
        submitting = asyncio.create_task(jobs.submit("lora", "me", run_briefly))
        start_time, longest_s = time.perf_counter(), 0.0
        for _ in range(20):
            await asyncio.sleep(0.02)
            now = time.perf_counter()
            start_time, longest_s = now, max(longest_s, now - start_time)
        assert not submitting.done()
        other_program.rollback()
        other_program.close()
        await submitting
        await jobs.drain(1)
        return longest_s

    assert asyncio.run(run()) < 1
