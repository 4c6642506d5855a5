"""``DecoderProcess``: a process that decodes uploaded images, and that can be ended.

Decoders are C code that cannot be interrupted in a thread. Their process has neither API keys nor
models, and a limit of memory. Its answers are read as sizes and pixels: whoever takes it over by
a hostile image cannot run code in the server.

    request: length, file
    answer:  width, height, RGB pixels; or 0, length, sentence
"""

import os
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from queue import SimpleQueue
from typing import Final

from PIL import Image

from hyperlora.data.image_formats import UPLOAD_FORMATS
from hyperlora.data.images import MAX_PIXELS, read_image
from hyperlora.errors import InvalidImageError

MAX_MEMORY_BYTES: Final = 1 << 30
"""Address space of the process, where the system limits it; 25 megapixels need up to half."""
MAX_CPU_S: Final = 60
"""Processor time for one image, where the system limits it, if no server ends the process."""
LOW_PRIORITY: Final = 10
"""Nice value of a process beside which others get nine tenths of a core."""
_READY: Final = b"ready\n"
_LENGTH: Final = struct.Struct(">Q")
_HEAD: Final = struct.Struct(">II")
_MAX_SENTENCE_BYTES: Final = 10_000
_KEPT_VARIABLES: Final = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "SYSTEMROOT", "TEMP", "TMP")


class DecoderEndedError(Exception):
    """The process ended before it had answered."""


class DecoderProcess:
    """A process that decodes one image at a time.

    It ends with the server, however that ends.
    """

    def __init__(self) -> None:
        search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
        variables = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=variables | {"PYTHONPATH": search_path, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # signals of a terminal are for the server
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._is_ready, self._is_usable = False, True

    @property
    def id(self) -> int:
        """Number of the process."""
        return self._process.pid

    @property
    def cpu_s(self) -> float:
        """Processor time that the process has taken; 0 once it has ended."""
        import psutil

        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return times.user + times.system

    @property
    def is_usable(self) -> bool:
        """Whether the process runs, at its first priority."""
        return self._is_usable and self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Wait until the process has started.

        Raises:
            RuntimeError: It did not start.
        """
        if self._is_ready:
            return
        try:
            self._read(len(_READY))
        except DecoderEndedError as error:
            raise RuntimeError("a process for images did not start") from error
        self._is_ready = True

    def read_image(self, data: bytes) -> Image.Image:
        """Read an image; see ``read_image`` of ``hyperlora.data.images``.

        Args:
            data: The file.

        Returns:
            The image, in 8-bit RGB.

        Raises:
            InvalidImageError: The image is refused.
            DecoderEndedError: The process ended over it, or was ended.
        """
        try:
            self._requests.write(_LENGTH.pack(len(data)))
            self._requests.write(data)
            self._requests.flush()
        except OSError as error:
            raise DecoderEndedError from error
        width, height = _HEAD.unpack(self._read(_HEAD.size))
        if not width:
            sentence = self._read(min(height, _MAX_SENTENCE_BYTES))
            raise InvalidImageError(sentence.decode("utf-8", "replace"))
        if width * height > MAX_PIXELS:  # not what ``_answer`` writes
            self.kill()
            raise DecoderEndedError
        pixels = self._read(3 * width * height)
        return Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)

    def lower_priority(self) -> None:
        """Let all other work go first, where the system has priorities."""
        if self._is_usable and hasattr(os, "setpriority"):
            self._is_usable = False  # only an administrator may raise it again
            with suppress(OSError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, self._process.pid, LOW_PRIORITY)

    def kill(self) -> None:
        """Make the process end at once, whatever it does; who waits for its answer gets none."""
        self._is_usable = False
        self._process.kill()

    def close(self) -> None:
        """End the process and free what belongs to it."""
        self.kill()
        self._process.wait()
        self._answers.close()
        with suppress(OSError):  # what was not sent
            self._requests.close()

    def _read(self, size: int) -> bytes:
        data = self._answers.read(size)
        if len(data) < size:
            self._is_usable = False
            raise DecoderEndedError
        return data


def _run_process() -> None:
    """Answer requests until the server closes the pipe or ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    files = SimpleQueue[bytes]()
    threading.Thread(target=_read_requests, args=(files,), daemon=True).start()
    answers.write(_READY)
    answers.flush()
    while True:
        _limit_resources()
        for part in _answer(files.get()):
            answers.write(part)
        answers.flush()


def _read_requests(files: "SimpleQueue[bytes]") -> None:
    """Read requests while an image is decoded, to learn at once that the server has ended."""
    while len(head := sys.stdin.buffer.read(_LENGTH.size)) == _LENGTH.size:
        files.put(sys.stdin.buffer.read(*_LENGTH.unpack(head)))
    os._exit(0)


def _answer(data: bytes) -> tuple[bytes, bytes]:
    try:
        image = read_image(data, UPLOAD_FORMATS)
        return _HEAD.pack(*image.size), image.tobytes()
    except InvalidImageError as error:
        sentence = str(error)
    except MemoryError:
        sentence = f"the image ({len(data)} bytes) needs too much memory: scale it down"
    encoded = sentence.encode("utf-8", "replace")[:_MAX_SENTENCE_BYTES]
    return _HEAD.pack(0, len(encoded)), encoded


def _limit_resources() -> None:
    """Limit memory, the processor time of the next image, and core dumps, which hold photos."""
    try:
        import resource
    except ImportError:  # Windows
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_AS: MAX_MEMORY_BYTES,
        resource.RLIMIT_CPU: int(usage.ru_utime + usage.ru_stime) + MAX_CPU_S,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        hard_limit = resource.getrlimit(name)[1]
        is_lower = hard_limit == resource.RLIM_INFINITY or value <= hard_limit
        with suppress(OSError, ValueError):  # a system that does not know the limit
            resource.setrlimit(name, (value if is_lower else hard_limit, hard_limit))


if __name__ == "__main__":
    _run_process()
