"""The page's client of the API: in process, with the key of the visitor."""

import html
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import gradio as gr
import httpx
from fastapi import FastAPI

from hyperlora.client import AsyncClient
from hyperlora.errors import HyperloraError, InvalidArgumentError
from hyperlora.service.engine.requests import ModelInfo
from hyperlora.service.ui.sessions import Sessions

Upload = str | Path | tuple[str, str | None]
"""An uploaded file of Gradio: its path, in a gallery with a caption."""

EDIT_KINDS: Final = ("pair-to-lora", "lorweb")
"""Kinds of models that make LoRAs of before/after pairs."""


class RecordingClient(AsyncClient):
    """A client that remembers the warnings and notes of the API's answers.

    Args:
        app: The app whose API it calls.
        key: API key of the visitor; None for none.
        host: Address of the visitor.
    """

    def __init__(self, app: FastAPI, key: str | None, host: str) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(host, 0))
        hooks = {"response": [self._record_warning]}
        super().__init__("http://127.0.0.1", key, transport=transport, event_hooks=hooks)

    async def _record_warning(self, response: httpx.Response) -> None:
        if warning := response.headers.get("Hyperlora-Warning"):
            self.warnings.append(warning)
        if note := response.headers.get("Hyperlora-Note"):
            self.notes.append(note)

    @property
    def unique_warnings(self) -> list[str]:
        """The warnings in order, each once."""
        return list(dict.fromkeys(self.warnings))

    async def load_model_infos(self) -> list[ModelInfo]:
        """Load what the API says of its models, the default one first."""
        return [ModelInfo(**fields) for fields in await self.list_models()]

    async def load_photo_model_info(self, name: str | None = None) -> ModelInfo:
        """Load what the API says of a model from photos.

        Args:
            name: Its name; None for the default one.

        Raises:
            HyperloraError: If the server has no such model.
        """
        for info in await self.load_model_infos():
            if info.kind not in EDIT_KINDS and name in (None, "", info.id):
                return info
        raise InvalidArgumentError(f"this server has no model {name!r}: choose another")

    async def load_model_info(self, kind: str) -> ModelInfo:
        """Load what the API says of its model of one kind, e.g. ``pair-to-lora``."""
        return next(info for info in await self.load_model_infos() if info.kind == kind)


class Api:
    """The API of an app, for one visitor at a time.

    Args:
        app: The app.
        sessions: Signed-in visitors; None for none.
    """

    def __init__(self, app: FastAPI, sessions: Sessions | None = None) -> None:
        self.app, self.sessions = app, sessions or Sessions()

    @asynccontextmanager
    async def open_client(self, visitor: gr.Request) -> AsyncIterator[RecordingClient]:
        """Open a client with the key and the address of a visitor.

        Args:
            visitor: The visitor's request.

        Yields:
            The client.

        Raises:
            gr.Error: If the API refuses a request, with its own sentence.
        """
        key = self.sessions.find_key(dict(visitor.cookies))
        try:
            async with RecordingClient(self.app, key, visitor.client.host) as client:
                yield client
        except HyperloraError as error:
            raise make_ui_error(str(error)) from error


def make_ui_error(detail: str) -> gr.Error:
    """Make an error that shows one sentence to the visitor and logs nothing."""
    message = html.escape(f"{detail[:1].upper()}{detail[1:]}", quote=False)
    return gr.Error(message, title="That did not work", print_exception=False)


def list_paths(uploads: Sequence[Upload] | None) -> list[Path]:
    """List the paths of the uploads of a gallery; none for None."""
    return [Path(upload[0] if isinstance(upload, tuple) else upload) for upload in uploads or []]


def read_uploads(uploads: Sequence[Upload] | None) -> list[bytes]:
    """Read the uploads of a gallery or of a list of files.

    Args:
        uploads: Uploaded files; None for none.

    Returns:
        The content of each file.

    Raises:
        gr.Error: If a file is no longer on the server.
    """
    try:
        return [path.read_bytes() for path in list_paths(uploads)]
    except FileNotFoundError as error:
        raise make_ui_error(
            "what was dropped here is no longer on the server: drop it again"
        ) from error
