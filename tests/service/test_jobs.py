"""The job table: after a kill, at a stop, and per owner."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from hyperlora.service.engine.batcher import QueueFullError
from hyperlora.service.engine.callbacks import ProgressFn
from hyperlora.service.jobs import Job, Jobs

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
    first = jobs.submit("lora", "me", run_briefly)
    async for job in jobs.stream(first):
        pass
    ids = [first.id]
    ids += [jobs.submit("lora", "me", run_forever).id for _ in range(20)]
    print(*ids, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


async def run_briefly(on_progress: ProgressFn) -> str:
    return "file"


def get_job(database_path: Path, id: str) -> Job:
    """Read a job as the next process would."""
    job = Jobs(database_path, 50).get(id, "me")
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
        found = [jobs.get(id, "me") for id in ids]
        assert [job.state for job in found if job] == ["succeeded"] + ["failed"] * 20
        assert all("send it again" in str(job.error) for job in found[1:] if job)
        assert jobs.get(ids[0], "you") is None

    asyncio.run(restart())


def test_jobs_drain_waits_for_active_ones(tmp_path: Path) -> None:
    database_path = tmp_path / "jobs.sqlite"

    async def run_slowly(on_progress: ProgressFn) -> str:
        await asyncio.sleep(0.2)
        return "file"

    async def stop() -> str:
        jobs = Jobs(database_path, 50)
        id = jobs.submit("lora", "me", run_slowly).id
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
        jobs = Jobs(database_path, 50, max_concurrent=1)
        ids = [jobs.submit("lora", "me", run_forever).id for _ in range(2)]  # one runs, one waits
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
        first = jobs.submit("lora", "me", run_briefly)
        with pytest.raises(QueueFullError, match="you have 1 open"):
            jobs.submit("lora", "me", run_briefly)
        jobs.submit("lora", "you", run_briefly)
        async for _ in jobs.stream(first):
            pass
        await asyncio.sleep(0.01)
        jobs.submit("lora", "me", run_briefly)
        jobs.delete_stale(100)
        assert jobs.get(first.id, "me") is not None
        jobs.delete_stale(0)
        assert jobs.get(first.id, "me") is None

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
        job = jobs.submit("lora", "me", run_slowly)
        stream_task = asyncio.create_task(list_states(jobs, job))
        await asyncio.sleep(0.05)
        await jobs.close_streams()
        states = await asyncio.wait_for(stream_task, 0.1)
        await jobs.drain(5)
        return states, get_job(database_path, job.id).state

    states, final_state = asyncio.run(stop())
    assert states[-1] in ("queued", "running")
    assert final_state == "succeeded"
