"""``Guard``: ends a process that leaves its folder, opens a network or starts a program."""

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

_WRITE_FLAGS: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PROCESS_EVENTS: Final = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.kill",
    "pty.",
    "ctypes.",
    "signal.pthread_kill",
)
_CHANGE_EVENTS: Final = (
    "os.chflags",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.removexattr",
    "os.rename",
    "os.rmdir",
    "os.setxattr",
    "os.symlink",
    "os.truncate",
    "os.utime",
)


class Guard:
    """An audit hook that ends the process when the template leaves its folder or opens a network.

    Audit hooks cannot be removed again, and the process ends inside of the hook, so that a template
    cannot catch the refusal.

    Attributes:
        work_dir: The only folder in which files may be written.
        readable_dirs: The folders in which files may be read.
        report: Writes the reason before the process ends.
    """

    def __init__(
        self, work_dir: Path, readable_dirs: Iterable[Path], report: Callable[[str], None]
    ) -> None:
        """Remember the folders by their real paths.

        Args:
            work_dir: The only folder in which files may be written.
            readable_dirs: Further folders in which files may be read.
            report: Takes the reason of a refusal.
        """
        self.work_dir = os.path.realpath(work_dir)
        self.readable_dirs = (self.work_dir, *(os.path.realpath(d) for d in readable_dirs))
        self.report = report

    def __call__(self, event: str, arguments: Sequence[Any]) -> None:
        """Check one event of Python's audit table.

        Args:
            event: The name of the event.
            arguments: Its arguments, as the table lists them.
        """
        if event.startswith("socket."):
            self._refuse("opened a network connection")
        elif event.startswith(_PROCESS_EVENTS):
            self._refuse(f"started or reached another program ({event})")
        elif event == "open":
            self._check_open(*arguments)
        elif event in _CHANGE_EVENTS:
            for path in arguments:
                if isinstance(path, str | bytes) and not self._is_inside(path, (self.work_dir,)):
                    self._refuse(f"changed {os.fsdecode(path)}")
        elif event == "import" and self._is_own_library(arguments):
            self._refuse(f"loaded a library that it wrote itself ({arguments[1]})")

    def _check_open(self, path: object, mode: object, flags: object) -> None:
        if not isinstance(path, str | bytes) or path in ("/dev/null", b"/dev/null"):
            return  # a file descriptor that is open already
        if os.path.isdir(path) and not self._is_inside(path, (self.work_dir,)):
            self._refuse(f"opened the folder {os.fsdecode(path)}")  # a way around checks of paths
        is_writing = isinstance(flags, int) and bool(flags & _WRITE_FLAGS)
        if is_writing and not self._is_inside(path, (self.work_dir,)):
            self._refuse(f"wrote {os.fsdecode(path)}")
        if not is_writing and not self._is_inside(path, self.readable_dirs):
            self._refuse(f"read {os.fsdecode(path)}")

    def _is_own_library(self, arguments: Sequence[Any]) -> bool:
        path = arguments[1] if len(arguments) > 1 else None
        return isinstance(path, str) and self._is_inside(path, (self.work_dir,))

    @staticmethod
    def _is_inside(path: str | bytes, folders: Iterable[str]) -> bool:
        real_path = os.path.realpath(os.fsdecode(path))
        return any(real_path == f or real_path.startswith(f + os.sep) for f in folders)

    def _refuse(self, action: str) -> NoReturn:
        self.report(action)
        traceback.print_stack()  # into the log
        sys.stderr.flush()
        os._exit(3)


def list_readable_dirs(model_dir: Path) -> list[Path]:
    """List the folders that a template may read: Python, its libraries, the system and the model.

    Args:
        model_dir: The folder of the model; its files may be links into a cache.

    Returns:
        The folders.
    """
    libraries = [Path(p) for p in sys.path if p]
    system = [Path(p) for p in ("/usr", "/lib", "/lib64", "/etc/ssl", "/proc", "/sys", "/dev")]
    linked = [Path(os.path.realpath(p)).parent for p in model_dir.iterdir() if p.is_symlink()]
    return [Path(sys.prefix), Path(sys.base_prefix), *libraries, *system, model_dir, *linked]
