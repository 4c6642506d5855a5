"""``DynamicBatcher``: one thread owns the models and runs waiting requests in batches."""

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import Any, Final, Generic, TypeVar

from hyperlora.compute import empty_cache, is_out_of_memory
from hyperlora.errors import OutOfMemoryError
from hyperlora.service.engine.callbacks import BatchCallback

PayloadT = TypeVar("PayloadT")
ResultT = TypeVar("ResultT")
_log = logging.getLogger("hyperlora.service")

UNFINISHED: Final = object()
"""What ``BatchSpec.run`` returns for a payload that it continues at its owner's next turn."""
OUT_OF_MEMORY: Final = (
    "the server ran out of memory over this request: ask for a smaller image, or for less at once"
)
_MAX_BATCH_WAITS: Final = 5
"""A batch stays open for at most so many times its spec's ``batch_timeout_s``."""
_STOP_TIMEOUT_S: Final = 0.5
"""Seconds that a step may still take when the batcher stops."""


class QueueFullError(Exception):
    """The queue holds as many requests as it may."""


class OwnerQueueFullError(QueueFullError):
    """The queue holds as many requests of one owner as it may."""


class ServerStoppingError(QueueFullError):
    """The server stops before the request is done."""

    def __init__(self, message: str = "the server is stopping: ask again in a moment") -> None:
        super().__init__(message)


class DeadlineExceededError(Exception):
    """The deadline of a request passed, or its caller left, before it was done."""


@dataclass(frozen=True)
class BatchSpec(Generic[PayloadT, ResultT]):
    """How payloads of one kind of work run on the model thread.

    Payloads that are submitted under equal specs may share a batch; ``run`` is not compared.

    Attributes:
        kind: Name of the work in metrics.
        run: Maps the payloads of one batch to as many results, in the same order. It returns
            ``UNFINISHED`` in place of a result to be called again with the same payload.
        key: Settings that two payloads must have in common to share a batch.
        max_batch_size: Largest number of payloads in one batch.
        low_priority: Whether the work is long. It takes turns with its owner's other work, and an
            owner has one such payload under way at a time.
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


class WorkFuture(Future[ResultT]):
    """A result whose caller may leave, also while the work runs."""

    is_abandoned = False
    """Whether ``cancel`` has been called."""

    def cancel(self) -> bool:
        """Cancel the work: at once while it waits, at its next step while it runs."""
        self.is_abandoned = True
        return super().cancel()


@dataclass(frozen=True, eq=False)
class _QueuedItem(Generic[PayloadT, ResultT]):
    """One payload in the queue; times are seconds of the monotonic clock."""

    spec: BatchSpec[PayloadT, ResultT]
    payload: PayloadT
    owner: str
    future: WorkFuture[ResultT]
    enqueued_at: float
    deadline: float

    @property
    def lane(self) -> tuple[str, bool]:
        """The owner, and whether the work is long."""
        return self.owner, self.spec.low_priority

    @property
    def has_caller(self) -> bool:
        """Whether somebody still waits for the result."""
        return not self.future.is_abandoned and time.monotonic() <= self.deadline

    def set_result(self, result: ResultT) -> None:
        """Answer the caller, unless that has been done."""
        with suppress(InvalidStateError):
            self.future.set_result(result)

    def set_exception(self, error: Exception) -> None:
        """Refuse the request, unless it has been answered."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


_AnyItem = _QueuedItem[Any, Any]  # one queue holds items of all kinds


class DynamicBatcher:
    """Run payloads on one thread, several of equal specs in one batch.

    Owners take turns: the next batch is for the one who has used the thread for the least time.
    Time without work earns nothing. Payloads of others share a batch, at most as many of each as
    of its owner.

    Args:
        max_queue_size: Payloads of normal priority that may wait, and as many of low priority.
        on_batch: Called on the thread with the kind and size of every batch.
        thread_name: Name of the thread, for stacks.
        max_queue_size_per_owner: The same for one owner; None for ``max_queue_size``.
    """

    def __init__(
        self,
        max_queue_size: int,
        on_batch: BatchCallback | None = None,
        thread_name: str = "hyperlora-model",
        max_queue_size_per_owner: int | None = None,
    ) -> None:
        self.max_queue_size, self._on_batch = max_queue_size, on_batch or (lambda kind, size: None)
        self.max_queue_size_per_owner = max_queue_size_per_owner or max_queue_size
        self._queue: list[_AnyItem] = []  # by age
        self._running: list[_AnyItem] = []
        self._num_turns = 0
        self._last_turns = defaultdict[tuple[str, bool], int](int)  # of lanes
        self._used_s = defaultdict[str, float](float)  # by owners
        self._least_used_s = 0.0  # of the owners with work; it never falls
        self._changed = threading.Condition()
        self._closed = self._stopping = False
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
        self,
        spec: BatchSpec[PayloadT, ResultT],
        payload: PayloadT,
        timeout_s: float = 120.0,
        owner: str = "",
    ) -> WorkFuture[ResultT]:
        """Queue one payload.

        Args:
            spec: The kind of work; payloads of equal specs may run together.
            payload: What ``spec.run`` takes one of.
            timeout_s: Seconds until the payload fails with ``DeadlineExceededError``, in the queue
                or at its next step.
            owner: Who takes turns with others.

        Returns:
            The future result. Cancelling it takes the payload out of the queue, or ends it at its
            next step.

        Raises:
            QueueFullError: If too many payloads wait, of all owners or of this one, or the batcher
                is closed.
        """
        now = time.monotonic()
        item = _QueuedItem(spec, payload, owner, WorkFuture[ResultT](), now, now + timeout_s)
        with self._changed:
            if self._closed:
                raise ServerStoppingError
            self._queue = [queued for queued in self._queue if not queued.future.cancelled()]
            lanes = Counter(queued.lane for queued in self._queue)
            num_waiting = sum(n for lane, n in lanes.items() if lane[1] == spec.low_priority)
            if num_waiting >= self.max_queue_size:
                raise QueueFullError(
                    f"{self.max_queue_size} requests are waiting already: ask again in a moment"
                )
            if lanes[item.lane] >= self.max_queue_size_per_owner:
                raise OwnerQueueFullError(
                    f"{self.max_queue_size_per_owner} of your requests are waiting already: "
                    "wait for one of them"
                )
            self._enter_owner(owner)
            self._queue.append(item)
            self._changed.notify()
        return item.future

    def _enter_owner(self, owner: str) -> None:
        """Let an owner without work begin at the time of the one who has used the least.

        Also where nobody has work: one who has worked alone would else wait for a newcomer until
        both have used as much.
        """
        if all(item.owner != owner for item in [*self._running, *self._queue]):
            self._used_s[owner] = max(self._used_s[owner], self._least_used_s)

    def check_running(self) -> None:
        """Raise if nobody waits for the running batch; long work calls it between its steps.

        Raises:
            ServerStoppingError: The batcher stops.
            DeadlineExceededError: All callers have left, or their deadlines have passed.
        """
        if self._stopping:
            raise ServerStoppingError
        if not any(item.has_caller for item in self._running):
            raise DeadlineExceededError("nobody waits for this any more: ask again, or for less")

    def close(self, timeout_s: float | None = None) -> None:
        """Refuse new payloads, finish those that wait, and end the thread.

        Args:
            timeout_s: Seconds to wait for the thread. What waits or runs then fails with
                ``ServerStoppingError``. None waits until the queue is empty.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        self._stopping = True
        self._thread.join(_STOP_TIMEOUT_S)
        for item in [*self._running, *self._queue]:  # behind a step that takes longer
            item.set_exception(ServerStoppingError())

    def _run_loop(self) -> None:
        while self._take_batch():
            owner, start_time = self._running[0].owner, time.monotonic()
            self._run_batch(self._running)
            with self._changed:
                self._used_s[owner] += time.monotonic() - start_time
                owners = {item.owner for item in self._queue} or {owner}
                least_used_s = min(self._used_s[name] for name in owners)
                self._least_used_s = max(self._least_used_s, least_used_s)
                self._running = []  # its payloads are free while the thread waits

    def _take_batch(self) -> bool:
        """Take the batch whose turn it is from the queue; return whether there is one."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                self._queue = [item for item in self._queue if not item.future.cancelled()]
                if not self._queue:
                    if self._closed:
                        return False
                    continue
                candidates = self._choose_batch()
                if (wait_s := self._compute_wait(candidates)) > 0:
                    self._changed.wait(wait_s)
                    continue
                self._queue = [item for item in self._queue if item not in candidates]
                self._num_turns += 1
                self._last_turns[candidates[0].lane] = self._num_turns
            is_resumed = candidates[0].future.running()
            self._running = [item for item in candidates if self._start_item(item)]
            if self._running and not is_resumed:
                self._on_batch(candidates[0].spec.kind, len(self._running))
            if self._running:
                return True

    def _choose_batch(self) -> list[_AnyItem]:
        """Choose the items of the next batch; the first is the one whose turn it is."""

        def get_turn(item: _AnyItem) -> tuple[float, int]:
            """Sort by the time of the owner and the last turn of the lane; then by age."""
            return self._used_s[item.owner], self._last_turns[item.lane]

        items = sorted(self._queue, key=get_turn)
        spec = items[0].spec
        rounds = Counter[str]()  # every owner adds one item to the batch in each round
        candidates: list[tuple[int, _AnyItem]] = []
        for item in (item for item in items if item.spec == spec):
            candidates.append((rounds[item.owner], item))
            rounds[item.owner] += 1
        candidates.sort(key=lambda candidate: candidate[0])
        num_rounds = rounds[items[0].owner]
        batch = [item for round_index, item in candidates if round_index < num_rounds]
        return batch[: spec.max_batch_size]

    def _compute_wait(self, batch: list[_AnyItem]) -> float:
        """Seconds that a batch may still wait for more payloads."""
        spec = batch[0].spec
        if self._closed or len(batch) == spec.max_batch_size or len(batch) < len(self._queue):
            return 0.0
        times = [item.enqueued_at for item in batch]
        close_time = min(
            max(times) + spec.batch_timeout_s, min(times) + _MAX_BATCH_WAITS * spec.batch_timeout_s
        )
        return close_time - time.monotonic()

    def _start_item(self, item: _AnyItem) -> bool:
        """Mark an item as running, unless it is cancelled or late."""
        if item.future.running():  # it goes on
            return True
        if not item.future.set_running_or_notify_cancel():
            return False
        if self._stopping:
            item.set_exception(ServerStoppingError())
        elif not item.has_caller:
            error = "the request waited longer than its deadline: ask again in a moment"
            item.set_exception(DeadlineExceededError(error))
        return not item.future.done()

    def _run_batch(self, batch: list[_AnyItem]) -> None:
        """Set every future; if the batch fails, run each remaining item alone."""
        self._running = batch
        if (error := self._try_batch(batch)) is None:
            return
        if len(batch) == 1 or isinstance(error, ServerStoppingError | DeadlineExceededError):
            for item in batch:
                item.set_exception(error)
            return
        for item in batch:
            if not item.future.done():
                self._run_batch([item])

    def _try_batch(self, batch: list[_AnyItem]) -> Exception | None:
        """Set every future, or return the error; after it, memory that has run out is free."""
        try:
            results = batch[0].spec.run([item.payload for item in batch])
            for item, result in zip(batch, results, strict=True):
                if result is UNFINISHED:
                    self._requeue(item)
                else:
                    item.set_result(result)
        except Exception as error:
            if not is_out_of_memory(error):
                return error
            kind, size = batch[0].spec.kind, len(batch)
            _log.warning("out of memory over %s (batch of %d): try serve --offload", kind, size)
            clear_frames(error.__traceback__)  # which hold the tensors of the batch
            empty_cache()
            return OutOfMemoryError(OUT_OF_MEMORY)
        return None

    def _requeue(self, item: _AnyItem) -> None:
        """Let an item wait for its next turn, in the place of its age."""
        with self._changed:
            self._queue.append(item)
            self._queue.sort(key=lambda queued: queued.enqueued_at)
