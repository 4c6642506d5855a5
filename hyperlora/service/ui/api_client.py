"""The page's way to the API: as the visitor, in process, with the API's own sentences as errors and notices."""

import html
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
from fastapi import FastAPI

from hyperlora.client import AsyncClient
from hyperlora.errors import HyperloraError
from hyperlora.service.ui.auth import decode_key_cookie


class RecordingClient(AsyncClient):
    """A client that remembers the ``warnings`` of the answers it got."""

    def __init__(self, app: FastAPI, key: str | None, host: str) -> None:
        self.warnings: list[str] = []

        async def record_warning(response: httpx.Response) -> None:
            if warning := response.headers.get("Hyperlora-Notice"):
                self.warnings.append(warning)

        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(host, 0))
        super().__init__(
            "http://127.0.0.1", key, transport=transport, event_hooks={"response": [record_warning]}
        )


class Api:
    """The API of ``app`` for one visitor at a time."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    @asynccontextmanager
    async def open_client(self, visitor: gr.Request) -> AsyncIterator[RecordingClient]:
        """Calls with the visitor's key and from the visitor's address. What the API refuses is shown as it says it."""
        try:
            async with RecordingClient(
                self.app, decode_key_cookie(dict(visitor.cookies)), visitor.client.host
            ) as client:
                yield client
        except HyperloraError as error:
            raise make_ui_error(str(error)) from error


def make_ui_error(detail: str) -> gr.Error:
    """One sentence for the visitor, and nothing in the log."""
    message = html.escape(f"{detail[:1].upper()}{detail[1:]}", quote=False)
    return gr.Error(message, title="That did not work", print_exception=False)


def read_uploads(paths: Any) -> list[bytes]:
    """The uploads of a gallery, which come as (path, caption), or of a list of files."""
    try:
        return [
            Path(item[0] if isinstance(item, tuple | list) else item).read_bytes()
            for item in paths or []
        ]
    except FileNotFoundError as error:
        raise make_ui_error(
            "what was dropped here is no longer kept on the server: drop it again"
        ) from error
