"""``DynamicBatcher``: one thread owns the model and does together what waits together."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

LOW_PRIORITY_MAX_WAIT_S: Final = 10.0


class QueueFullError(Exception):
    """As many requests wait as may wait."""


class DeadlineExceededError(Exception):
    """A request's deadline passed before its turn came."""


@dataclass(frozen=True)
class BatchSpec:
    """A kind of work: payloads submitted under equal ``generate_invalid_key`` may go through ``run_build`` together, ``max_batch_size`` at a time.
    What is ``low_priority`` lets the others go first for ``LOW_PRIORITY_MAX_WAIT_S`` seconds. While nothing else waits, a batch stays open
    for ``batch_timeout_s`` seconds after its last payload came, and five times as long after its first."""

    key: Hashable
    run: Callable[[list[Any]], Sequence[Any]] = field(compare=False)
    max_batch_size: int = 1
    low_priority: bool = False
    batch_timeout_s: float = 0.0


@dataclass(frozen=True)
class _QueuedItem:
    spec: BatchSpec
    payload: Any
    future: "Future[Any]"
    enqueued_at: float
    deadline: float

    @property
    def is_urgent(self) -> bool:
        return (
            not self.spec.low_priority
            or time.monotonic() > self.enqueued_at + LOW_PRIORITY_MAX_WAIT_S
        )


class DynamicBatcher:
    """At most ``max_queue_size`` patient and as many other payloads wait. ``on_batch`` is told the kind's key and size of
    every batch."""

    def __init__(
        self, max_queue_size: int, on_batch: Callable[[Hashable, int], None] | None = None
    ) -> None:
        self.max_queue_size, self._on_batch = max_queue_size, on_batch or (lambda key, size: None)
        self._queue: deque[_QueuedItem] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run_loop, name="hyperlora-model", daemon=True)
        self._thread.start()

    @property
    def queue_length(self) -> int:
        return sum(not w.future.cancelled() for w in list(self._queue))

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def submit(self, spec: BatchSpec, payload: Any, timeout_s: float = 120.0) -> "Future[Any]":
        """The result, later. Cancelling the future before its turn takes it out of the queue; after ``timeout_s`` in
        the queue it fails with ``DeadlineExceededError``. Raises ``QueueFullError`` at once if too many wait."""
        future: Future[Any] = Future()
        now = time.monotonic()
        with self._changed:
            if self._closed:
                raise QueueFullError("the server is stopping: ask again in a moment")
            self._queue = deque(w for w in self._queue if not w.future.cancelled())
            if (
                sum(w.spec.low_priority == spec.low_priority for w in self._queue)
                >= self.max_queue_size
            ):
                raise QueueFullError(
                    f"{self.max_queue_size} requests are waiting already: ask again in a moment"
                )
            self._queue.append(_QueuedItem(spec, payload, future, now, now + timeout_s))
            self._changed.notify()
        return future

    def close(self, timeout_s: float | None = None) -> None:
        """Take nothing more, finish what waits and end the thread; after ``timeout_s``, cancel what waits and leave."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        with self._changed:
            for item in self._queue:
                item.future.cancel()

    def _run_loop(self) -> None:
        while batch := self._get_next_batch():
            self._on_batch(batch[0].spec.key, len(batch))
            _run_batch(batch)

    def _get_next_batch(self) -> list[_QueuedItem]:
        """The oldest that is not patient (if all are, the oldest) and those that can go with it; none at the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return []
                oldest = next((w for w in self._queue if w.is_urgent), self._queue[0])
                candidates = [w for w in self._queue if w.spec == oldest.spec][
                    : oldest.spec.max_batch_size
                ]
                if (wait_s := self._compute_wait(candidates)) > 0:
                    self._changed.wait(wait_s)
                    continue
                candidate_ids = set(map(id, candidates))
                self._queue = deque(w for w in self._queue if id(w) not in candidate_ids)
            if batch := [w for w in candidates if _start_item(w)]:
                return batch

    def _compute_wait(self, batch: list[_QueuedItem]) -> float:
        """For how many more seconds a batch may wait for others."""
        spec = batch[0].spec
        if self._closed or len(batch) == spec.max_batch_size or len(batch) < len(self._queue):
            return 0.0
        return (
            min(
                batch[-1].enqueued_at + spec.batch_timeout_s,
                batch[0].enqueued_at + 5 * spec.batch_timeout_s,
            )
            - time.monotonic()
        )


def _start_item(item: _QueuedItem) -> bool:
    if not item.future.set_running_or_notify_cancel():
        return False
    if time.monotonic() > item.deadline:
        item.future.set_exception(
            DeadlineExceededError(
                "the request waited longer than its deadline: ask again in a moment"
            )
        )
        return False
    return True


def _run_batch(batch: list[_QueuedItem]) -> None:
    """Set every future. Where one payload makes a batch fail, the others are done without it."""
    try:
        for item, result in zip(batch, batch[0].spec.run([w.payload for w in batch]), strict=True):
            item.future.set_result(result)
    except Exception as error:
        if len(batch) == 1:
            batch[0].future.set_exception(error)
            return
        for item in batch:
            if not item.future.done():
                _run_batch([item])
