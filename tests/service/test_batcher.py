"""Batches of the model thread: which payloads share one, which wait, which fail."""

import threading
import time
from typing import Any

import pytest

from hyperlora.errors import InvalidArgumentError
from hyperlora.service.engine.batcher import (
    UNFINISHED,
    BatchSpec,
    DeadlineExceededError,
    DynamicBatcher,
    OwnerQueueFullError,
    QueueFullError,
    ServerStoppingError,
)

Payload = int | str


class HeldBatcher:
    """A batcher whose thread is held until ``release`` is set; it records its batches."""

    def __init__(self, max_queue_size: int = 10) -> None:
        self.batches: list[list[Payload]] = []
        self.release = threading.Event()
        self.batcher = DynamicBatcher(max_queue_size)
        self.batcher.submit(BatchSpec("hold", self._hold), 0)
        while self.batcher.queue_length:
            time.sleep(0.001)

    def _hold(self, payloads: list[Payload]) -> list[Payload]:
        self.release.wait(5)
        return payloads

    def make_spec(
        self, kind: str, low_priority: bool = False, max_batch_size: int = 3
    ) -> BatchSpec[Payload, Payload]:
        """Make a spec of batches of up to three payloads, which are doubled."""
        return BatchSpec(
            kind, self._double, max_batch_size=max_batch_size, low_priority=low_priority
        )

    def _double(self, payloads: list[Payload]) -> list[Payload]:
        self.batches.append(payloads)
        if "bad" in payloads:
            raise InvalidArgumentError("bad one")
        return [payload * 2 for payload in payloads]


def test_batcher_runs_equal_specs_together() -> None:
    held = HeldBatcher()
    a, b = held.make_spec("a"), held.make_spec("b")
    low_priority = held.batcher.submit(held.make_spec("p", low_priority=True), 9)
    futures = [held.batcher.submit(spec, i) for i, spec in enumerate((a, b, a, a, a))]
    futures[2].cancel()
    held.release.set()
    assert [f.result(2) for f in (futures[0], futures[1], futures[3], futures[4])] == [0, 2, 6, 8]
    assert low_priority.result(2) == 18
    assert held.batches == [[9], [0, 3, 4], [1]]  # long work has its turn after other work
    held.batcher.close()


def test_batcher_keeps_a_batch_open_for_close_payloads() -> None:
    batches: list[list[int]] = []

    def run(payloads: list[int]) -> list[int]:
        batches.append(payloads)
        return payloads

    batcher = DynamicBatcher(10)
    brief, long = (
        BatchSpec(f"{timeout_s}", run, max_batch_size=4, batch_timeout_s=timeout_s)
        for timeout_s in (0.5, 60)
    )
    together = [batcher.submit(brief, i) for i in range(3)]
    assert [f.result(5) for f in together] == [0, 1, 2]
    full = [batcher.submit(long, i) for i in range(4)]
    assert [f.result(5) for f in full] == [0, 1, 2, 3], "a full batch waits for nothing"
    waiting, other = batcher.submit(long, 5), batcher.submit(brief, 6)
    assert (waiting.result(5), other.result(5)) == (5, 6), "other work is queued"
    assert batches == [[0, 1, 2], [0, 1, 2, 3], [5], [6]]
    batcher.close()


def test_batcher_isolates_a_bad_payload() -> None:
    held = HeldBatcher()
    futures = [held.batcher.submit(held.make_spec("a"), p) for p in ("x", "bad", "y")]
    held.release.set()
    assert (futures[0].result(2), futures[2].result(2)) == ("xx", "yy")
    with pytest.raises(InvalidArgumentError, match="bad one"):
        futures[1].result(2)


def test_batcher_refuses_beyond_queue_deadline_and_end() -> None:
    held = HeldBatcher(max_queue_size=1)
    late = held.batcher.submit(held.make_spec("a"), 1, timeout_s=0.0)
    with pytest.raises(QueueFullError, match="1 requests are waiting"):
        held.batcher.submit(held.make_spec("a"), 2)
    time.sleep(0.01)
    held.release.set()
    with pytest.raises(DeadlineExceededError):
        late.result(2)
    held.batcher.close()
    with pytest.raises(QueueFullError, match="stopping"):
        held.batcher.submit(held.make_spec("a"), 2)


def test_batcher_drops_cancelled_payloads_from_the_queue() -> None:
    held = HeldBatcher(max_queue_size=2)
    waiting = [held.batcher.submit(held.make_spec("a"), i) for i in range(2)]
    held.batcher.submit(held.make_spec("p", low_priority=True), 9)  # counted separately
    with pytest.raises(QueueFullError):
        held.batcher.submit(held.make_spec("a"), 2)
    for future in waiting:
        future.cancel()
    assert held.batcher.queue_length == 1
    assert held.batcher.submit(held.make_spec("a"), 3)
    held.release.set()
    held.batcher.close()


def submit_for(held: HeldBatcher, kind: str, owner: str, *payloads: Payload, size: int) -> None:
    """Submit payloads of one owner, in batches of up to ``size``."""
    for payload in payloads:
        held.batcher.submit(held.make_spec(kind, max_batch_size=size), payload, owner=owner)


def test_batcher_lets_owners_take_turns() -> None:
    held = HeldBatcher(max_queue_size=100)
    submit_for(held, "image", "alice", *range(20), size=1)
    submit_for(held, "lora", "bob", "b1", "b2", size=1)
    submit_for(held, "lora", "carol", "c1", size=1)
    held.release.set()
    held.batcher.close()
    assert held.batches[0] == [0]
    assert {str(batch[0])[0] for batch in held.batches[1:3]} == {"b", "c"}
    assert max(held.batches.index([payload]) for payload in ("b1", "b2", "c1")) < 10


def test_batcher_shares_a_batch_evenly_among_owners() -> None:
    held = HeldBatcher(max_queue_size=100)
    submit_for(held, "image", "alice", *range(6), size=8)
    submit_for(held, "other", "alice", "x", size=8)
    held.batcher._used_s["alice"] = 1.0  # as if Alice had been served last
    submit_for(held, "image", "bob", "b", size=8)
    held.release.set()
    held.batcher.close()
    assert held.batches == [["b", 0], [1, 2, 3, 4, 5], ["x"]], "Bob's waits for one of hers only"


def test_batcher_limits_what_waits_of_one_owner() -> None:
    held = HeldBatcher(max_queue_size=100)
    held.batcher.max_queue_size_per_owner = 2
    submit_for(held, "image", "alice", 1, 2, size=1)
    with pytest.raises(OwnerQueueFullError, match="2 of your requests are waiting"):
        submit_for(held, "image", "alice", 3, size=1)
    submit_for(held, "image", "bob", 4, size=1)
    held.release.set()
    held.batcher.close()
    assert held.batches == [[1], [4], [2]]


class SteppedWork:
    """Work of some steps, which records whose steps run."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.steps: list[str] = []
        self.spec = BatchSpec[list[str], int]("work", self._advance, low_priority=True)

    def _advance(self, payloads: list[list[str]]) -> list[Any]:
        (payload,) = payloads
        time.sleep(0.01)
        self.steps.append(payload[0])
        payload.append("step")
        return [len(payload) if len(payload) > self.num_steps else UNFINISHED]


def test_batcher_interleaves_the_steps_of_owners() -> None:
    held, work = HeldBatcher(), SteppedWork(num_steps=3)
    futures = [held.batcher.submit(work.spec, [name], owner=name[0]) for name in ("a1", "a2", "b1")]
    held.release.set()
    assert [future.result(2) for future in futures] == [4, 4, 4]
    assert work.steps[:2] == ["a1", "b1"] and set(work.steps[-3:]) == {"a2"}


def test_batcher_shares_time_not_turns() -> None:
    batcher, ends = DynamicBatcher(100), list[str]()

    def run(payloads: list[tuple[str, float]]) -> list[int]:
        ((name, seconds),) = payloads
        time.sleep(seconds)
        ends.append(name)
        return [0]

    spec = BatchSpec[tuple[str, float], int]("work", run)
    for _ in range(10):
        batcher.submit(spec, ("long", 0.1), owner="alice")
    futures = [batcher.submit(spec, ("short", 0.005), owner="bob") for _ in range(6)]
    for future in futures:
        future.result(5)
    assert ends.count("long") <= 3, "six short ones are less than one long one"
    batcher.close(0)


def test_batcher_ends_a_running_batch_when_all_callers_have_left() -> None:
    batcher, started, ended = DynamicBatcher(10), threading.Event(), threading.Event()

    def run(payloads: list[int]) -> list[int]:
        started.set()
        for _ in range(400):
            time.sleep(0.005)
            try:
                batcher.check_running()
            except DeadlineExceededError:
                ended.set()
                raise
        return payloads

    spec = BatchSpec("image", run, max_batch_size=2, batch_timeout_s=5)
    first, second = (batcher.submit(spec, i, owner=str(i)) for i in range(2))
    assert started.wait(2)
    first.cancel()
    assert not ended.wait(0.05), "one of them still waits"
    second.cancel()
    assert ended.wait(1)
    late = batcher.submit(BatchSpec("image", run), 1, timeout_s=0.05)
    with pytest.raises(DeadlineExceededError):
        late.result(1)


def test_batcher_ends_all_work_when_it_is_closed() -> None:
    batcher = DynamicBatcher(10)

    def run(payloads: list[int]) -> list[int]:
        for _ in range(1000):
            time.sleep(0.005)
            batcher.check_running()
        return payloads

    def run_one_long_step(payloads: list[int]) -> list[int]:
        time.sleep(1.5)
        return payloads

    futures = [batcher.submit(BatchSpec("image", run), i) for i in range(2)]
    time.sleep(0.02)
    batcher.close(0.05)
    for future in futures:
        with pytest.raises(ServerStoppingError, match="is stopping"):
            future.result(0)
    stuck = DynamicBatcher(10)
    future = stuck.submit(BatchSpec("image", run_one_long_step), 1)
    time.sleep(0.02)
    stuck.close(0)
    with pytest.raises(ServerStoppingError):
        future.result(0)


def test_batcher_lets_nobody_wait_for_a_newcomer_to_use_as_much() -> None:
    """The newcomer has much work; the other one worked alone before, and comes for a little."""
    order: list[str] = []

    def make_spec(name: str) -> BatchSpec[float, float]:
        def run(payloads: list[float]) -> list[float]:
            order.append(name)
            time.sleep(payloads[0])
            return payloads

        return BatchSpec(name, run, max_batch_size=1)

    batcher = DynamicBatcher(20)
    batcher.submit(make_spec("alone"), 0.5, owner="bob").result(5)
    many = [batcher.submit(make_spec("alice"), 0.05, owner="alice") for _ in range(8)]
    many[0].result(5)
    batcher.submit(make_spec("bob"), 0.0, owner="bob").result(5)
    assert order.index("bob") <= 4
    batcher.close(5)
