"""Batching, the job table after a crash, kept files, bodies that stall."""

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hyperlora.errors import InvalidArgumentError
from hyperlora.service.engine.batcher import (
    BatchSpec,
    DeadlineExceededError,
    DynamicBatcher,
    QueueFullError,
)
from hyperlora.service.file_store import FileStore, lock_directory
from hyperlora.service.jobs import Jobs
from hyperlora.service.settings import API_KEYS_ENV, load_api_keys


class Blocked:
    """A batcher whose thread is held until ``go``; keeps the batches it ran."""

    def __init__(self, capacity: int = 10) -> None:
        self.batches: list[list[Any]] = []
        self.go = threading.Event()
        self.batcher = DynamicBatcher(capacity)
        self.first = self.batcher.submit(BatchSpec("hold", self._hold), None)
        while self.batcher.queue_length:
            time.sleep(0.001)

    def _hold(self, payloads: list[Any]) -> list[Any]:
        self.go.wait(5)
        return payloads

    def work(self, key: str, largest: int = 3, patient: bool = False) -> BatchSpec:
        return BatchSpec(key, self._run, largest, patient)

    def _run(self, payloads: list[Any]) -> list[Any]:
        self.batches.append(payloads)
        if "bad" in payloads:
            raise InvalidArgumentError("bad one")
        return [p * 2 for p in payloads]


def test_what_waits_together_goes_together() -> None:
    held = Blocked()
    a, b = held.work("a"), held.work("b")
    patient = held.batcher.submit(held.work("p", patient=True), 9)
    futures = [held.batcher.submit(w, i) for i, w in enumerate((a, b, a, a, a))]
    futures[2].cancel()
    held.go.set()
    assert [f.result(2) for f in (futures[0], futures[1], futures[3], futures[4])] == [0, 2, 6, 8]
    assert patient.result(2) == 18
    assert held.batches == [[0, 3], [1], [4], [9]]  # up to 3 taken, one of which was cancelled
    held.batcher.close()


def test_a_batch_stays_open_for_what_follows_closely() -> None:
    batches: list[list[int]] = []

    def run(payloads: list[int]) -> list[int]:
        batches.append(payloads)
        return payloads

    batcher = DynamicBatcher(10)
    brief, long = (
        BatchSpec(seconds, run, max_batch_size=4, batch_timeout_s=seconds) for seconds in (0.5, 60)
    )
    together = [batcher.submit(brief, i) for i in range(3)]
    assert [f.result(5) for f in together] == [0, 1, 2]
    full = [batcher.submit(long, i) for i in range(4)]
    assert [f.result(5) for f in full] == [0, 1, 2, 3], "nobody else fits in"
    waiting, other = batcher.submit(long, 5), batcher.submit(brief, 6)
    assert (waiting.result(5), other.result(5)) == (5, 6), "others wait"
    assert batches == [[0, 1, 2], [0, 1, 2, 3], [5], [6]]
    batcher.close()


def test_one_bad_payload_does_not_spoil_its_batch() -> None:
    held = Blocked()
    futures = [held.batcher.submit(held.work("a"), p) for p in ("x", "bad", "y")]
    held.go.set()
    assert (futures[0].result(2), futures[2].result(2)) == ("xx", "yy")
    with pytest.raises(InvalidArgumentError, match="bad one"):
        futures[1].result(2)


def test_capacity_deadline_and_end() -> None:
    held = Blocked(capacity=1)
    late = held.batcher.submit(held.work("a"), 1, timeout_s=0.0)
    with pytest.raises(QueueFullError, match="1 requests are waiting"):
        held.batcher.submit(held.work("a"), 2)
    time.sleep(0.01)
    held.go.set()
    with pytest.raises(DeadlineExceededError):
        late.result(2)
    held.batcher.close()
    with pytest.raises(QueueFullError, match="stopping"):
        held.batcher.submit(held.work("a"), 2)


_ACCEPT = """
import asyncio, sys
from pathlib import Path
from hyperlora.service.jobs import Jobs

async def never(report):
    await asyncio.sleep(1000)

async def quick(report):
    report(0.5)
    return "made"

async def main():
    jobs = Jobs(Path(sys.argv[1]), 50)
    first = jobs.accept("lora", "me", quick)
    async for job in jobs.follow(first):
        pass
    ids = [first.id]
    ids += [jobs.accept("lora", "me", never).id for _ in range(20)]
    print(*ids, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


def test_no_job_vanishes_when_the_server_is_killed(tmp_path: Path) -> None:
    table = tmp_path / "jobs.sqlite"
    with subprocess.Popen(
        [sys.executable, "-c", _ACCEPT, str(table)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        ids = server.stdout.readline().split()
        server.kill()

    async def restart() -> None:
        jobs = Jobs(table, 50)
        found = [jobs.get(id, "me") for id in ids]
        assert [job.state for job in found if job] == ["succeeded"] + ["failed"] * 20
        assert all("send it again" in str(job.error) for job in found[1:] if job)
        assert jobs.get(ids[0], "you") is None

    asyncio.run(restart())


def test_stopping_waits_for_jobs(tmp_path: Path) -> None:
    async def slow(report: Any) -> str:
        await asyncio.sleep(0.2)
        return "made"

    async def stop() -> str:
        jobs = Jobs(tmp_path / "jobs.sqlite", 50)
        id = jobs.submit("lora", "me", slow).id
        await asyncio.sleep(0.01)
        await jobs.drain(5)
        return str(Jobs(tmp_path / "jobs.sqlite", 50).get(id, "me").state)  # type: ignore[union-attr]

    assert asyncio.run(stop()) == "succeeded"


def test_a_job_that_cannot_finish_in_time_is_reported_as_failed(tmp_path: Path) -> None:
    async def never(report: Any) -> str:
        await asyncio.sleep(100)
        return ""

    async def stop() -> Any:
        jobs = Jobs(tmp_path / "jobs.sqlite", 50, max_concurrent=1)
        ids = [jobs.submit("lora", "me", never).id for _ in range(2)]  # one runs, one is queued
        await asyncio.sleep(0.05)
        await jobs.drain(0.1)
        return [Jobs(tmp_path / "jobs.sqlite", 50).get(id, "me") for id in ids]

    for job in asyncio.run(stop()):
        assert (job.state, job.error) == (
            "failed",
            "the server stopped before this job was done: send it again",
        )


def test_no_caller_takes_all_jobs_and_old_ones_are_forgotten(tmp_path: Path) -> None:
    async def quick(report: Any) -> str:
        return "made"

    async def run() -> None:
        jobs = Jobs(tmp_path / "jobs.sqlite", 50, max_jobs_per_owner=1)
        first = jobs.submit("lora", "me", quick)
        with pytest.raises(QueueFullError, match="you have 1 open"):
            jobs.submit("lora", "me", quick)
        jobs.submit("lora", "you", quick)
        async for _ in jobs.stream(first):
            pass
        await asyncio.sleep(0.01)
        jobs.submit("lora", "me", quick)
        jobs.delete_stale(100)
        assert jobs.get(first.id, "me") is not None
        jobs.delete_stale(0)
        assert jobs.get(first.id, "me") is None

    asyncio.run(run())


def test_one_server_owns_its_state(tmp_path: Path) -> None:
    with (
        lock_directory(tmp_path),
        pytest.raises(InvalidArgumentError, match="another server uses"),
        lock_directory(tmp_path),
    ):
        pass
    with lock_directory(tmp_path):
        pass


def test_cancelled_requests_do_not_fill_the_queue() -> None:
    held = Blocked(capacity=2)
    waiting = [held.batcher.submit(held.work("a"), i) for i in range(2)]
    held.batcher.submit(held.work("p", patient=True), 9)  # counted apart
    with pytest.raises(QueueFullError):
        held.batcher.submit(held.work("a"), 2)
    for future in waiting:
        future.cancel()
    assert held.batcher.queue_length == 1
    assert held.batcher.submit(held.work("a"), 3)
    held.go.set()
    held.batcher.close()


def test_files_are_found_by_content_and_by_nothing_else(tmp_path: Path) -> None:
    files = FileStore(tmp_path / "files", 100)
    id = files.store_bytes(b"abc", "lora")
    assert files.get_bytes(id, "lora") == b"abc"
    assert files.get_bytes(id, "image") is None
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    for odd in ("../secret", "../../secret", id.upper(), "", id + "\n", "."):
        assert files.get_bytes(odd, "lora") is None
        assert not files.delete(odd, "lora")
    assert files.delete(id, "lora")
    assert files.get_bytes(id, "lora") is None


def test_keys_come_from_a_file_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("first-key-123456\n\n  second-key-12345 \n")
    monkeypatch.setenv(API_KEYS_ENV, "third-key-1234567,")
    assert len(load_api_keys(file)) == 3
    file.write_text("short\n")
    with pytest.raises(InvalidArgumentError, match="shorter than 16"):
        load_api_keys(file)
    file.write_text("\n")
    monkeypatch.delenv(API_KEYS_ENV)
    with pytest.raises(InvalidArgumentError, match="holds no key"):
        load_api_keys(file)
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        load_api_keys(tmp_path / "none")


def test_a_server_that_stops_ends_event_streams_and_finishes_their_jobs(tmp_path: Path) -> None:
    async def slow(report: Any) -> str:
        await asyncio.sleep(0.3)
        return "made"

    async def stop() -> tuple[list[str], str]:
        jobs = Jobs(tmp_path / "jobs.sqlite", 50)
        job = jobs.submit("lora", "me", slow)
        following = asyncio.create_task(_states(jobs, job))
        await asyncio.sleep(0.05)
        await jobs.close_streams()
        seen = await asyncio.wait_for(following, 0.1)
        await jobs.drain(5)
        return seen, str(Jobs(tmp_path / "jobs.sqlite", 50).get(job.id, "me").state)  # type: ignore[union-attr]

    async def _states(jobs: Jobs, job: Any) -> list[str]:
        return [now.state async for now in jobs.stream(job)]

    seen, state = asyncio.run(stop())
    assert seen[-1] in ("queued", "running")
    assert state == "succeeded"
