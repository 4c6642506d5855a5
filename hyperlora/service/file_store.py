"""``Files``: what callers asked to keep, found by the SHA-256 of its content, for a while."""

import fcntl
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from hyperlora.errors import BadRequest
from hyperlora.lora.io.safetensors_file import write_bytes

_ID: Final = re.compile(r"[0-9a-f]{64}")
KINDS: Final = {"lora": ".safetensors", "image": ".png"}


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """While open, no other process can own ``folder``. Raises ``BadRequest`` if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadRequest(
                f"another server uses {str(folder)!r} already: stop it, or give another --state"
            ) from error
        yield


@dataclass(frozen=True)
class Files:
    """Content-addressed files below ``folder``, each gone ``seconds`` after it was last put there.

    A name on disk is made of a digest that has been checked, never of anything else a caller sent.
    """

    folder: Path
    seconds: float

    def put(self, data: bytes, kind: str) -> str:
        """Keep ``data``, whole or not at all; its id."""
        found = sha256(data).hexdigest()
        write_bytes(data, self._path(found, kind))
        return found

    def get(self, id: str, kind: str) -> bytes | None:
        """The content, or None if nothing of that id is kept (any more)."""
        if not _ID.fullmatch(id):
            return None
        path = self._path(id, kind)
        try:
            return path.read_bytes() if path.stat().st_mtime + self.seconds > time.time() else None
        except FileNotFoundError:
            return None

    def delete(self, id: str, kind: str) -> bool:
        """Whether there was something to delete."""
        if not _ID.fullmatch(id) or not (path := self._path(id, kind)).is_file():
            return False
        path.unlink(missing_ok=True)
        return True

    def sweep(self) -> int:
        """Delete what has outlived its time, and halves of a killed write; how many."""
        swept = 0
        for path in self.folder.glob("*/*"):
            with suppress(FileNotFoundError):  # someone else deleted it
                if path.stat().st_mtime + self.seconds <= time.time():
                    path.unlink()
                    swept += 1
        return swept

    def _path(self, id: str, kind: str) -> Path:
        return self.folder / id[:2] / f"{id}{KINDS[kind]}"
