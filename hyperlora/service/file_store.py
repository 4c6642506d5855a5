"""``FileStore``: files that callers asked to store, by the SHA-256 of their content."""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal

from filelock import FileLock, Timeout

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.safetensors_file import write_bytes

FileKind = Literal["lora", "image"]
SUFFIXES: Final[dict[FileKind, str]] = {"lora": ".safetensors", "image": ".png"}
_log = logging.getLogger("hyperlora.service")
_ID: Final = re.compile(r"[0-9a-f]{64}")


class StorageError(Exception):
    """The disk of the server does not take or give something."""

    def __init__(
        self,
        message: str = "the disk of the server is full or busy, and nothing was stored: "
        "ask again in a moment",
    ) -> None:
        super().__init__(message)


@contextmanager
def lock_directory(folder: Path) -> Iterator[None]:
    """Own a folder while the context is open; no other process can own it then.

    Args:
        folder: The folder; made, for this user alone, if it is not there.

    Raises:
        InvalidArgumentError: If another process owns it, or its lock is a link.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock_path = folder / "lock"
    if lock_path.is_symlink():  # never open what it leads to
        raise InvalidArgumentError(
            f"{str(lock_path)!r} is a link, a file of the server was expected: remove it"
        )
    try:
        lock = FileLock(lock_path).acquire(timeout=0)
    except Timeout as error:
        raise InvalidArgumentError(
            f"another server uses {str(folder)!r} already: stop it, or give another --state-dir"
        ) from error
    with lock:  # an acquired lock, which is released at the end
        yield


def make_private_dir(folder: Path) -> None:
    """Make a folder that other users of the machine cannot open, also if it is there already."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _set_mode(folder, 0o700)


def make_private_file(path: Path) -> None:
    """Make a file that other users of the machine cannot open; one that is there is kept."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(0o600)
    _set_mode(path, 0o600)


def _set_mode(path: Path, mode: int) -> None:
    """Set the mode of a path, unless it is another user's or its file system has none."""
    with suppress(PermissionError):
        path.chmod(mode)


@dataclass(frozen=True)
class FileStore:
    """Content-addressed files of several owners, that expire.

    Every owner has a folder, so that nobody learns what another one stores; a file of two owners
    is there twice. A name on disk is a digest that has been made or checked, never anything else
    that a caller sent.

    Attributes:
        folder: Where the files lie.
        retention_s: Seconds that a file is kept after it was last stored.
    """

    folder: Path
    retention_s: float

    def store_bytes(self, data: bytes, kind: FileKind, owner: str) -> str:
        """Store a file, whole or not at all.

        Args:
            data: Content of the file.
            kind: Kind of the file.
            owner: Who may read and delete it.

        Returns:
            The id: 64 hexadecimal digits of the SHA-256.

        Raises:
            StorageError: If the disk is full.
        """
        digest = sha256(data).hexdigest()
        try:
            write_bytes(data, self._get_path(digest, kind, owner))
        except OSError as error:
            _log.warning("a file is not stored: %s", error.strerror)
            raise StorageError from error
        return digest

    def get_bytes(self, id: str, kind: FileKind, owner: str) -> bytes | None:
        """Read a stored file.

        Args:
            id: What ``store_bytes`` returned, or anything else.
            kind: Kind of the file.
            owner: Who asks.

        Returns:
            The content, or None if this owner stores no such file (any more).
        """
        if not _ID.fullmatch(id):
            return None
        path = self._get_path(id, kind, owner)
        with suppress(FileNotFoundError):
            if not self._is_stale(path):
                return path.read_bytes()
        return None

    def delete(self, id: str, kind: FileKind, owner: str) -> bool:
        """Delete a stored file of one owner.

        Args:
            id: What ``store_bytes`` returned, or anything else.
            kind: Kind of the file.
            owner: Who asks.

        Returns:
            Whether this owner stored the file.
        """
        if not _ID.fullmatch(id) or not (path := self._get_path(id, kind, owner)).is_file():
            return False
        path.unlink(missing_ok=True)
        return True

    def delete_stale(self) -> int:
        """Delete files that have expired, also the halves of a killed write.

        Returns:
            The number of deleted files.
        """
        num_deleted = 0
        for path in self.folder.glob("*/*"):
            with suppress(FileNotFoundError):  # a caller deleted it meanwhile
                if self._is_stale(path):
                    path.unlink()
                    num_deleted += 1
        return num_deleted

    def _is_stale(self, path: Path) -> bool:
        return path.stat().st_mtime + self.retention_s <= time.time()

    def _get_path(self, id: str, kind: FileKind, owner: str) -> Path:
        owner_digest = sha256(owner.encode()).hexdigest()[:32]
        return self.folder / owner_digest / f"{id}{SUFFIXES[kind]}"
