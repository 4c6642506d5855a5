"""``Batcher``: one thread owns the model and does together what waits together."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

PATIENCE: Final = 10.0


class QueueFull(Exception):
    """As many requests wait as may wait."""


class Expired(Exception):
    """A request's deadline passed before its turn came."""


@dataclass(frozen=True)
class Work:
    """A kind of work: payloads submitted under equal ``key`` may go through ``run`` together, ``largest`` at a time.
    What is ``patient`` lets the others go first for ``PATIENCE`` seconds. While nothing else waits, a batch stays open
    for ``gather`` seconds after its last payload came, and five times as long after its first."""

    key: Hashable
    run: Callable[[list[Any]], Sequence[Any]] = field(compare=False)
    largest: int = 1
    patient: bool = False
    gather: float = 0.0


@dataclass(frozen=True)
class _Waiting:
    work: Work
    payload: Any
    future: "Future[Any]"
    since: float
    until: float

    @property
    def urgent(self) -> bool:
        return not self.work.patient or time.monotonic() > self.since + PATIENCE


class Batcher:
    """At most ``capacity`` patient and as many other payloads wait. ``observe`` is told the kind's key and size of
    every batch."""

    def __init__(self, capacity: int, observe: Callable[[Hashable, int], None] | None = None) -> None:
        self.capacity, self._observe = capacity, observe or (lambda key, size: None)
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="hyperlora-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return sum(not w.future.cancelled() for w in list(self._queue))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def submit(self, work: Work, payload: Any, seconds: float = 120.0) -> "Future[Any]":
        """The result, later. Cancelling the future before its turn takes it out of the queue; after ``seconds`` in
        the queue it fails with ``Expired``. Raises ``QueueFull`` at once if too many wait."""
        future: Future[Any] = Future()
        now = time.monotonic()
        with self._changed:
            if self._closed:
                raise QueueFull("the server is stopping: ask again in a moment")
            self._queue = deque(w for w in self._queue if not w.future.cancelled())
            if sum(w.work.patient == work.patient for w in self._queue) >= self.capacity:
                raise QueueFull(f"{self.capacity} requests are waiting already: ask again in a moment")
            self._queue.append(_Waiting(work, payload, future, now, now + seconds))
            self._changed.notify()
        return future

    def close(self, seconds: float | None = None) -> None:
        """Take nothing more, finish what waits and end the thread; after ``seconds``, cancel what waits and leave."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            for item in self._queue:
                item.future.cancel()

    def _work(self) -> None:
        while batch := self._next():
            self._observe(batch[0].work.key, len(batch))
            _done(batch)

    def _next(self) -> list[_Waiting]:
        """The oldest that is not patient (if all are, the oldest) and those that can go with it; none at the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return []
                first = next((w for w in self._queue if w.urgent), self._queue[0])
                chosen = [w for w in self._queue if w.work == first.work][: first.work.largest]
                if (seconds := self._open(chosen)) > 0:
                    self._changed.wait(seconds)
                    continue
                taken = set(map(id, chosen))
                self._queue = deque(w for w in self._queue if id(w) not in taken)
            if batch := [w for w in chosen if _still_wanted(w)]:
                return batch

    def _open(self, batch: list[_Waiting]) -> float:
        """For how many more seconds a batch may wait for others."""
        work = batch[0].work
        if self._closed or len(batch) == work.largest or len(batch) < len(self._queue):
            return 0.0
        return min(batch[-1].since + work.gather, batch[0].since + 5 * work.gather) - time.monotonic()


def _still_wanted(item: _Waiting) -> bool:
    if not item.future.set_running_or_notify_cancel():
        return False
    if time.monotonic() > item.until:
        item.future.set_exception(Expired("the request waited longer than its deadline: ask again in a moment"))
        return False
    return True


def _done(batch: list[_Waiting]) -> None:
    """Set every future. Where one payload makes a batch fail, the others are done without it."""
    try:
        for item, result in zip(batch, batch[0].work.run([w.payload for w in batch]), strict=True):
            item.future.set_result(result)
    except Exception as error:
        if len(batch) == 1:
            batch[0].future.set_exception(error)
            return
        for item in batch:
            if not item.future.done():
                _done([item])
