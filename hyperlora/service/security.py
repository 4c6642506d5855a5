"""Who may call and how often; how large and how slow a request may be."""

import asyncio
import hmac
import math
import time
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials
from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hyperlora.service.settings import digest

_bearer = HTTPBearer(auto_error=False, description="An API key, if the server asks for one.")
_header = APIKeyHeader(name="X-API-Key", auto_error=False, description="The same, for tools without bearer tokens.")


class Gate:
    """Keys and their rates. ``rate`` is in the words of ``limits``: ``60/minute``."""

    def __init__(self, keys: frozenset[bytes], rate: str) -> None:
        self.keys, self.rate = keys, parse(rate)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def owner(self, key: str | None, host: str) -> str:
        """Whose request this is: a digest of the key, or the host where no key is asked for. Raises 401 and 429."""
        if not self.keys:
            owner = f"host {host}"
        else:
            given = digest(key or "")
            known = [hmac.compare_digest(given, mine) for mine in self.keys]  # all of them, however early one fits
            if not any(known):
                raise HTTPException(
                    401,
                    "an API key of this server is needed: send Authorization: Bearer KEY",
                    {"WWW-Authenticate": "Bearer"},
                )
            owner = given.hex()[:16]
        if not self._limiter.hit(self.rate, owner):
            reset = self._limiter.get_window_stats(self.rate, owner).reset_time
            wait = max(1, math.ceil(reset - time.time()))
            raise HTTPException(429, f"more than {self.rate}: wait {wait} s", {"Retry-After": str(wait)})
        return owner


async def _caller(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    key: Annotated[str | None, Security(_header)],
) -> str:
    gate: Gate = request.app.state.service.gate
    host = request.client.host if request.client else "unknown"
    owner = gate.owner(bearer.credentials if bearer else key, host)
    request.state.owner = owner
    return owner


Caller = Annotated[str, Depends(_caller)]
"""The owner of a request, in a route's parameters."""


class BodyLimits:
    """ASGI middleware: 413 for a body above ``largest`` bytes, 408 for one that stalls for ``seconds``."""

    def __init__(self, app: ASGIApp, largest: int, seconds: float) -> None:
        self.app, self.largest, self.seconds = app, largest, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        left, complete = self.largest, False
        sentence = f"the request is larger than {self.largest >> 20} MiB: send fewer or smaller files"
        claimed = dict(scope["headers"]).get(b"content-length", b"0")

        async def limited() -> Message:
            nonlocal left, complete
            if complete:
                return await receive()
            if claimed.isdigit() and int(claimed) > self.largest:
                raise HTTPException(413, sentence)
            try:
                message: Any = await asyncio.wait_for(receive(), self.seconds)
            except TimeoutError:
                raise HTTPException(408, f"nothing more of the request came for {self.seconds:g} s") from None
            left -= len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if left < 0:
                raise HTTPException(413, sentence)
            return message

        await self.app(scope, limited, send)
