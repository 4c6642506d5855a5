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
from hyperlora.service.ui.auth import key_of


class Asked(AsyncClient):
    """A client that remembers the ``notices`` of the answers it got."""

    def __init__(self, app: FastAPI, key: str | None, host: str) -> None:
        self.notices: list[str] = []

        async def listen(response: httpx.Response) -> None:
            if said := response.headers.get("Hyperlora-Notice"):
                self.notices.append(said)

        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(host, 0))
        super().__init__("http://127.0.0.1", key, transport=transport, event_hooks={"response": [listen]})


class Api:
    """The API of ``app`` for one visitor at a time."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    @asynccontextmanager
    async def of(self, visitor: gr.Request) -> AsyncIterator[Asked]:
        """Calls with the visitor's key and from the visitor's address. What the API refuses is shown as it says it."""
        try:
            async with Asked(self.app, key_of(dict(visitor.cookies)), visitor.client.host) as client:
                yield client
        except HyperloraError as error:
            raise refused(str(error)) from error


def refused(sentence: str) -> gr.Error:
    """One sentence for the visitor, and nothing in the log."""
    said = html.escape(f"{sentence[:1].upper()}{sentence[1:]}", quote=False)
    return gr.Error(said, title="That did not work", print_exception=False)


def contents(paths: Any) -> list[bytes]:
    """The uploads of a gallery, which come as (path, caption), or of a list of files."""
    try:
        return [Path(item[0] if isinstance(item, tuple | list) else item).read_bytes() for item in paths or []]
    except FileNotFoundError as error:
        raise refused("what was dropped here is no longer kept on the server: drop it again") from error
