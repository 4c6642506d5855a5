"""``DecoderPool``: uploaded images are decoded in a few processes, each for a limited time."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from PIL import Image

from hyperlora.errors import InvalidImageError
from hyperlora.service.engine.batcher import QueueFullError, ServerStoppingError
from hyperlora.service.engine.decoder_process import DecoderEndedError, DecoderProcess

DecodedT = TypeVar("DecodedT")
PrepareFn = Callable[[list[Image.Image]], DecodedT]
"""Makes what a model needs of decoded images."""
MAX_DECODERS: Final = 4
"""Images that are decoded at a time; it bounds memory."""
MAX_WAITING: Final = 256
"""Tasks that may wait for a process."""
_LOW_PRIORITY_TIME_S: Final = 0.3
"""Time of an image after which other work goes first."""
_CLOCK_FACTOR: Final = 3
_WATCH_INTERVAL_S: Final = 0.05
_RETRY: Final = "ask again in a moment"


@dataclass(frozen=True)
class DecodeLimits:
    """Time for one image: seconds of a processor, or three times as many on the clock.

    Attributes:
        timeout_s: Seconds after which its process is ended.
        contended_timeout_s: The same while other images wait for a process.
    """

    timeout_s: float = 10.0
    contended_timeout_s: float = 2.0


@dataclass(eq=False)
class _Task:
    """Files to decode; ``process`` and the times are those of the file under way."""

    files: Sequence[bytes]
    prepare: PrepareFn[Any]
    owner: str
    future: "Future[Any]" = field(default_factory=Future)
    process: DecoderProcess | None = None
    start_time: float = 0.0
    start_cpu_s: float = 0.0
    end_error: Exception | None = None

    @property
    def spent_s(self) -> float:
        """Time that the file under way has taken, as ``DecodeLimits`` counts it."""
        if self.process is None:
            return 0.0
        clock_s = time.monotonic() - self.start_time
        return max(self.process.cpu_s - self.start_cpu_s, clock_s / _CLOCK_FACTOR)

    def start(self, process: DecoderProcess) -> None:
        """Begin a file, unless the work has been ended. The pool's lock is held.

        Args:
            process: What decodes the file.
        """
        if self.end_error is not None:
            raise self.end_error
        self.start_time, self.start_cpu_s = time.monotonic(), process.cpu_s
        self.process = process

    def end(self, error: Exception) -> None:
        """End the work; ``error`` says why. The pool's lock is held."""
        self.end_error = self.end_error or error
        if self.process is not None:
            self.process.kill()

    def set_error(self, error: Exception) -> None:
        """Set the error, unless the task was cancelled."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class DecoderPool:
    """Processes that decode images, and threads that prepare these for a model.

    An image that takes long has less priority, so that others are decoded meanwhile. It is ended
    at its time limit, sooner while others wait, and at once when nobody wants it any more.

    Args:
        num_processes: Images that are decoded and prepared at a time.
        limits: Seconds of one image.
    """

    def __init__(
        self, num_processes: int = MAX_DECODERS, limits: DecodeLimits | None = None
    ) -> None:
        self.num_processes, self.limits = num_processes, limits or DecodeLimits()
        self._executor = ThreadPoolExecutor(num_processes, "hyperlora-decoder")
        self._lock = threading.Lock()
        self._waiting: list[_Task] = []
        self._running: list[_Task] = []
        self._idle: list[DecoderProcess] = []
        self._is_watched = self._is_closed = False

    def submit(
        self, files: Sequence[bytes], prepare: PrepareFn[DecodedT], owner: str = ""
    ) -> "Future[DecodedT]":
        """Decode files, one after the other, and prepare the images in another thread.

        Args:
            files: PNG, JPEG or WEBP files.
            prepare: Makes the result of the decoded images.
            owner: Who takes turns with others.

        Returns:
            The future result; ``InvalidImageError`` if an image is refused, ``QueueFullError`` if
            it takes long while others wait. Cancelling it ends the work.

        Raises:
            QueueFullError: If too many wait, or the pool is closed.
        """
        task = _Task(files, prepare, owner)
        with self._lock:
            if self._is_closed:
                raise ServerStoppingError
            if len(self._waiting) >= MAX_WAITING:
                raise QueueFullError(f"{MAX_WAITING} images wait to be decoded already: {_RETRY}")
            self._waiting.append(task)
            self._executor.submit(self._run_next)
        task.future.add_done_callback(lambda _: self._forget(task))
        return task.future

    def close(self) -> None:
        """End all processes, and with them the work."""
        error = ServerStoppingError()
        with self._lock:
            self._is_closed = True
            waiting, idle = self._waiting, self._idle
            self._waiting, self._idle = [], []
            for task in self._running:
                task.end(error)
        for task in waiting:
            task.set_error(error)
        for process in idle:
            process.close()
        self._executor.shutdown(wait=False)

    def _forget(self, task: _Task) -> None:
        """Forget a task that is done, and end its process if it was cancelled."""
        with self._lock:
            if task in self._waiting:
                self._waiting.remove(task)
            if task.future.cancelled():
                task.end(QueueFullError("nobody waits for the image"))

    def _run_next(self) -> None:
        with self._lock:
            if not self._waiting:
                return  # it was cancelled
            owners = [task.owner for task in self._running]
            task = min(self._waiting, key=lambda task: owners.count(task.owner))  # the oldest such
            self._waiting.remove(task)
            self._running.append(task)
            if not self._is_watched:
                self._is_watched = True
                threading.Thread(target=self._watch, daemon=True).start()
        try:
            result = task.prepare([self._decode(data, task) for data in task.files])
        except Exception as error:
            task.set_error(error)
        else:
            with suppress(InvalidStateError):  # it was cancelled
                task.future.set_result(result)
        finally:
            with self._lock:
                self._running.remove(task)

    def _decode(self, data: bytes, task: _Task) -> Image.Image:
        process = self._take_process()
        try:
            process.wait_until_ready()
            with self._lock:
                task.start(process)
            return process.read_image(data)
        except DecoderEndedError:
            raise task.end_error or InvalidImageError(
                f"the image ({len(data)} bytes) broke its decoder: save it again as PNG or JPEG"
            ) from None
        finally:
            with self._lock:
                task.process = None
            self._return_process(process)

    def _take_process(self) -> DecoderProcess:
        """Take a process that is idle, or a new one; have another one ready for the next."""
        with self._lock:
            process = self._idle.pop() if self._idle else None
            is_spare_needed = not self._idle and len(self._running) < self.num_processes
        if is_spare_needed:
            self._return_process(DecoderProcess())
        return process or DecoderProcess()

    def _return_process(self, process: DecoderProcess) -> None:
        """Keep a process; one that has ended, or has less priority now, is replaced."""
        if not process.is_usable:
            process.close()
            process = DecoderProcess()
        with self._lock:
            if not self._is_closed and len(self._idle) < self.num_processes:
                self._idle.append(process)
                return
        process.close()

    def _watch(self) -> None:
        """End images at their limit, as long as any is decoded."""
        while True:
            with self._lock:
                if not self._running:
                    self._is_watched = False
                    return
                self._end_slow_tasks()
            time.sleep(_WATCH_INTERVAL_S)

    def _end_slow_tasks(self) -> None:
        limits, num_waiting = self.limits, len(self._waiting)
        times = [(task.spent_s, i) for i, task in enumerate(self._running)]
        for rank, (spent_s, i) in enumerate(sorted(times, reverse=True)):
            task = self._running[i]
            if spent_s > limits.timeout_s:
                task.end(
                    InvalidImageError(
                        f"an image took longer than {limits.timeout_s:g} s to decode, a second was "
                        "expected: save it again as an ordinary PNG or JPEG"
                    )
                )
            elif rank < num_waiting and spent_s > limits.contended_timeout_s:
                task.end(
                    QueueFullError(
                        f"an image took longer than {limits.contended_timeout_s:g} s to decode "
                        f"while others waited: send a smaller one, or {_RETRY}"
                    )
                )
            elif task.process is not None and spent_s > _LOW_PRIORITY_TIME_S:
                task.process.lower_priority()
