"""Batches of the model thread: which payloads share one, which wait, which fail."""

import threading
import time

import pytest

from hyperlora.errors import InvalidArgumentError
from hyperlora.service.engine.batcher import (
    BatchSpec,
    DeadlineExceededError,
    DynamicBatcher,
    QueueFullError,
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

    def make_spec(self, kind: str, low_priority: bool = False) -> BatchSpec[Payload, Payload]:
        """Make a spec of batches of up to three payloads, which are doubled."""
        return BatchSpec(kind, self._double, max_batch_size=3, low_priority=low_priority)

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
    assert held.batches == [[0, 3], [1], [4], [9]]  # up to 3 taken, one of which was cancelled
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
