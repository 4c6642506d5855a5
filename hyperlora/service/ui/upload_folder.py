"""``UploadFolder``: the files of visitors, how much they may send, and when they are deleted."""

import asyncio
import os
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from hyperlora.service.file_store import make_private_dir

RETENTION_S: Final = 3600
"""Seconds that uploads and results of visitors lie on the server."""
SWEEP_INTERVAL_S: Final = 600
"""Seconds between two deletions of what is out of date."""


class UploadFolder:
    """The folder of the page's files. Nothing of it outlives the server.

    Args:
        folder: The folder, of this server alone.
        retention_s: Seconds after its last use that a file is kept.
        sweep_interval_s: Seconds between two deletions of what is out of date.
        max_bytes_per_visitor: What one visitor may send within ``retention_s``.
        max_bytes: What all may send within ``retention_s``.
    """

    def __init__(
        self,
        folder: Path,
        retention_s: float = RETENTION_S,
        sweep_interval_s: float = SWEEP_INTERVAL_S,
        max_bytes_per_visitor: int = 1 << 30,
        max_bytes: int = 4 << 30,
    ) -> None:
        make_private_dir(folder)
        self.folder, self.retention_s = folder.resolve(), retention_s
        self.sweep_interval_s = sweep_interval_s
        self.max_bytes_per_visitor, self.max_bytes = max_bytes_per_visitor, max_bytes
        self._received: deque[tuple[float, str, int]] = deque()  # time, visitor, bytes
        self._num_bytes: Counter[str] = Counter()

    def delete_older_than(self, age_s: float) -> None:
        """Delete files, also the halves of interrupted uploads, and folders that are empty then.

        Args:
            age_s: Seconds since the last change of a file; 0 for all files.
        """
        newest_time = time.time() - age_s
        for parent, folder_names, file_names in os.walk(self.folder, topdown=False):
            for name in file_names:
                path = Path(parent, name)
                with suppress(OSError):  # Gradio deleted it meanwhile
                    if age_s == 0 or path.lstat().st_mtime < newest_time:
                        path.unlink()
            for name in folder_names:
                with suppress(OSError):  # it is not empty, or a link
                    Path(parent, name).rmdir()

    @asynccontextmanager
    async def own(self) -> AsyncIterator[None]:
        """Begin and end without files; in between delete what is out of date."""
        await asyncio.to_thread(self.delete_older_than, 0)
        sweep_task = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            sweep_task.cancel()
            await asyncio.to_thread(self.delete_older_than, 0)

    def add_to_lifespan(self, app: FastAPI) -> None:
        """Own the folder as long as an app runs."""
        run_lifespan = app.router.lifespan_context

        @asynccontextmanager
        async def run_with_folder(app: FastAPI) -> AsyncIterator[Any]:
            async with self.own(), run_lifespan(app) as state:
                yield state

        app.router.lifespan_context = run_with_folder

    def count_upload(self, receive: Receive, visitor: str) -> Receive:
        """Count the bytes of a body as they come.

        Args:
            receive: Receives the messages of the request.
            visitor: Whose request it is.

        Returns:
            The same, which raises ``HTTPException`` above a limit.
        """

        async def receive_and_count() -> Message:
            message = await receive()
            self._count(visitor, len(message.get("body", b"")))
            return message

        return receive_and_count

    def _count(self, visitor: str, num_bytes: int) -> None:
        now = time.monotonic()
        while self._received and self._received[0][0] + self.retention_s < now:
            _, old_visitor, old_bytes = self._received.popleft()
            self._num_bytes[old_visitor] -= old_bytes
            if not self._num_bytes[old_visitor]:
                del self._num_bytes[old_visitor]
        self._received.append((now, visitor, num_bytes))
        self._num_bytes[visitor] += num_bytes
        period = f"within {self.retention_s / 60:g} minutes"
        if self._num_bytes[visitor] > self.max_bytes_per_visitor:
            size = self.max_bytes_per_visitor >> 20
            raise HTTPException(429, f"you sent more than {size} MiB {period}: wait, or send less")
        if self._num_bytes.total() > self.max_bytes:
            size = self.max_bytes >> 20
            raise HTTPException(
                507, f"visitors sent more than {size} MiB {period}: send it later, or to the API"
            )

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.sweep_interval_s)
            with suppress(OSError):
                await asyncio.to_thread(self.delete_older_than, self.retention_s)
