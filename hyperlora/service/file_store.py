"""``FileStore``: what callers asked to keep, found by the SHA-256 of its content, for a while."""

import fcntl
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.safetensors_file import write_bytes

_ID: Final = re.compile(r"[0-9a-f]{64}")
SUFFIXES: Final = {"lora": ".safetensors", "image": ".png"}


@contextmanager
def lock_directory(folder: Path) -> Iterator[None]:
    """While open, no other process can own ``folder``. Raises ``InvalidArgumentError`` if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InvalidArgumentError(
                f"another server uses {str(folder)!r} already: stop it, or give another --state"
            ) from error
        yield


@dataclass(frozen=True)
class FileStore:
    """Content-addressed files below ``folder``, each gone ``retention_s`` after it was last put there.

    A name on disk is made of a digest that has been checked, never of anything else a caller sent.
    """

    folder: Path
    retention_s: float

    def store_bytes(self, data: bytes, kind: str) -> str:
        """Keep ``data``, whole or not at all; its id."""
        digest = sha256(data).hexdigest()
        write_bytes(data, self._get_path(digest, kind))
        return digest

    def get_bytes(self, id: str, kind: str) -> bytes | None:
        """The content, or None if nothing of that id is kept (any more)."""
        if not _ID.fullmatch(id):
            return None
        path = self._get_path(id, kind)
        try:
            return (
                path.read_bytes() if path.stat().st_mtime + self.retention_s > time.time() else None
            )
        except FileNotFoundError:
            return None

    def delete(self, id: str, kind: str) -> bool:
        """Whether there was something to delete."""
        if not _ID.fullmatch(id) or not (path := self._get_path(id, kind)).is_file():
            return False
        path.unlink(missing_ok=True)
        return True

    def delete_stale(self) -> int:
        """Delete what has outlived its time, and halves of a killed write; how many."""
        num_deleted = 0
        for path in self.folder.glob("*/*"):
            with suppress(FileNotFoundError):  # someone else deleted it
                if path.stat().st_mtime + self.retention_s <= time.time():
                    path.unlink()
                    num_deleted += 1
        return num_deleted

    def _get_path(self, id: str, kind: str) -> Path:
        return self.folder / id[:2] / f"{id}{SUFFIXES[kind]}"
