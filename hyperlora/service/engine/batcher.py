"""``DynamicBatcher``: one thread owns the models and runs waiting requests in batches."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import Any, Final, Generic, TypeVar

from hyperlora.compute import empty_cache, is_out_of_memory
from hyperlora.errors import OutOfMemoryError
from hyperlora.service.engine.callbacks import BatchCallback

PayloadT = TypeVar("PayloadT")
ResultT = TypeVar("ResultT")
_log = logging.getLogger("hyperlora.service")

LOW_PRIORITY_MAX_WAIT_S: Final = 10.0
"""A payload of low priority that has waited longer than this is served by its age."""
OUT_OF_MEMORY: Final = (
    "the server ran out of memory over this request: ask for a smaller image, or for less at once"
)
_MAX_BATCH_WAITS: Final = 5
"""A batch stays open for at most so many times its spec's ``batch_timeout_s``."""


class QueueFullError(Exception):
    """The queue holds as many requests as it may."""


class DeadlineExceededError(Exception):
    """The deadline of a request passed before its turn came."""


@dataclass(frozen=True)
class BatchSpec(Generic[PayloadT, ResultT]):
    """How payloads of one kind of work run on the model thread.

    Payloads that are submitted under equal specs may share a batch; ``run`` is not compared.

    Attributes:
        kind: Name of the work in metrics.
        run: Maps the payloads of one batch to as many results, in the same order.
        key: Settings that two payloads must have in common to share a batch.
        max_batch_size: Largest number of payloads in one batch.
        low_priority: Whether other work goes first, for ``LOW_PRIORITY_MAX_WAIT_S`` seconds.
        in_own_process: Whether ``run`` waits for a process of its own, so that the models of this
            one may serve other requests meanwhile.
        batch_timeout_s: Seconds that a batch waits for another payload while nothing else is
            queued. It waits at most five times as long in all.
    """

    kind: str
    run: Callable[[list[PayloadT]], Sequence[ResultT]] = field(compare=False)
    key: Hashable = None
    max_batch_size: int = 1
    low_priority: bool = False
    in_own_process: bool = False
    batch_timeout_s: float = 0.0


@dataclass(frozen=True)
class _QueuedItem(Generic[PayloadT, ResultT]):
    """One payload in the queue; times are seconds of the monotonic clock."""

    spec: BatchSpec[PayloadT, ResultT]
    payload: PayloadT
    future: "Future[ResultT]"
    enqueued_at: float
    deadline: float

    @property
    def is_urgent(self) -> bool:
        """Whether the item is served by its age."""
        waited_s = time.monotonic() - self.enqueued_at
        return not self.spec.low_priority or waited_s > LOW_PRIORITY_MAX_WAIT_S


_AnyItem = _QueuedItem[Any, Any]  # one queue holds items of all kinds


class DynamicBatcher:
    """Run payloads on one thread, several of equal specs in one batch.

    Args:
        max_queue_size: Payloads of normal priority that may wait, and as many of low priority.
        on_batch: Called on the thread with the kind and size of every batch.
        thread_name: Name of the thread, for stacks.
    """

    def __init__(
        self,
        max_queue_size: int,
        on_batch: BatchCallback | None = None,
        thread_name: str = "hyperlora-model",
    ) -> None:
        self.max_queue_size, self._on_batch = max_queue_size, on_batch or (lambda kind, size: None)
        self._queue: deque[_AnyItem] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run_loop, name=thread_name, daemon=True)
        self._thread.start()

    @property
    def queue_length(self) -> int:
        """Number of payloads that wait and are not cancelled."""
        return sum(not item.future.cancelled() for item in list(self._queue))

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and takes payloads."""
        return self._thread.is_alive() and not self._closed

    def submit(
        self, spec: BatchSpec[PayloadT, ResultT], payload: PayloadT, timeout_s: float = 120.0
    ) -> "Future[ResultT]":
        """Queue one payload.

        Args:
            spec: The kind of work; payloads of equal specs may run together.
            payload: What ``spec.run`` takes one of.
            timeout_s: Seconds the payload may wait in the queue. Later it fails with
                ``DeadlineExceededError``.

        Returns:
            The future result. Cancelling it before its turn takes the payload out of the queue.

        Raises:
            QueueFullError: If too many payloads wait, or the batcher is closed.
        """
        future: Future[ResultT] = Future()
        now = time.monotonic()
        with self._changed:
            if self._closed:
                raise QueueFullError("the server is stopping: ask again in a moment")
            self._queue = deque(item for item in self._queue if not item.future.cancelled())
            num_waiting = sum(item.spec.low_priority == spec.low_priority for item in self._queue)
            if num_waiting >= self.max_queue_size:
                raise QueueFullError(
                    f"{self.max_queue_size} requests are waiting already: ask again in a moment"
                )
            self._queue.append(_QueuedItem(spec, payload, future, now, now + timeout_s))
            self._changed.notify()
        return future

    def close(self, timeout_s: float | None = None) -> None:
        """Refuse new payloads, finish those that wait, and end the thread.

        Args:
            timeout_s: Seconds to wait for the thread; what still waits then is cancelled.
                None waits until the queue is empty.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        with self._changed:
            for item in self._queue:
                item.future.cancel()

    def _run_loop(self) -> None:
        while batch := self._get_next_batch():
            self._on_batch(batch[0].spec.kind, len(batch))
            _run_batch(batch)

    def _get_next_batch(self) -> list[_AnyItem]:
        """Take the oldest urgent item (or the oldest) and those that fit; empty when closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return []
                oldest = next((item for item in self._queue if item.is_urgent), self._queue[0])
                candidates = [item for item in self._queue if item.spec == oldest.spec]
                candidates = candidates[: oldest.spec.max_batch_size]
                if (wait_s := self._compute_wait(candidates)) > 0:
                    self._changed.wait(wait_s)
                    continue
                candidate_ids = set(map(id, candidates))
                self._queue = deque(item for item in self._queue if id(item) not in candidate_ids)
            if batch := [item for item in candidates if _start_item(item)]:
                return batch

    def _compute_wait(self, batch: list[_AnyItem]) -> float:
        """Seconds that a batch may still wait for more payloads."""
        spec = batch[0].spec
        if self._closed or len(batch) == spec.max_batch_size or len(batch) < len(self._queue):
            return 0.0
        close_time = min(
            batch[-1].enqueued_at + spec.batch_timeout_s,
            batch[0].enqueued_at + _MAX_BATCH_WAITS * spec.batch_timeout_s,
        )
        return close_time - time.monotonic()


def _start_item(item: _AnyItem) -> bool:
    """Mark an item as running, unless it is cancelled or late."""
    if not item.future.set_running_or_notify_cancel():
        return False
    if time.monotonic() > item.deadline:
        error = "the request waited longer than its deadline: ask again in a moment"
        item.future.set_exception(DeadlineExceededError(error))
        return False
    return True


def _run_batch(batch: list[_AnyItem]) -> None:
    """Set every future; if the batch fails, run each remaining item alone."""
    if (error := _try_batch(batch)) is None:
        return
    if len(batch) == 1:
        batch[0].future.set_exception(error)
        return
    for item in batch:
        if not item.future.done():
            _run_batch([item])


def _try_batch(batch: list[_AnyItem]) -> Exception | None:
    """Set every future, or return the error; after it, memory that has run out is free again."""
    try:
        results = batch[0].spec.run([item.payload for item in batch])
        for item, result in zip(batch, results, strict=True):
            item.future.set_result(result)
    except Exception as error:
        if not is_out_of_memory(error):
            return error
        kind, size = batch[0].spec.kind, len(batch)
        _log.warning("out of memory over %s (batch of %d): try serve --offload", kind, size)
        clear_frames(error.__traceback__)  # which hold the tensors of the batch
        empty_cache()
        return OutOfMemoryError(OUT_OF_MEMORY)
    return None
