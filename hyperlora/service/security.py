"""Who may call and how often; how large and how slow a request may be."""

import asyncio
import hmac
import math
import time
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials
from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hyperlora.service.errors import problem
from hyperlora.service.settings import digest

LOCAL: Final = frozenset({"127.0.0.1", "localhost", "::1"})
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
            if not self.knows(key):
                self._count(f"unknown at {host}")
                raise HTTPException(
                    401,
                    "an API key of this server is needed: send Authorization: Bearer KEY",
                    {"WWW-Authenticate": "Bearer"},
                )
            owner = digest(key or "").hex()[:16]
        self._count(owner)
        return owner

    def knows(self, key: str | None) -> bool:
        """Whether this is one of the keys; counts nothing."""
        given = digest(key or "")
        return sum(hmac.compare_digest(given, mine) for mine in self.keys) > 0  # all of them, however early one fits

    def _count(self, owner: str) -> None:
        if not self._limiter.hit(self.rate, owner):
            reset = self._limiter.get_window_stats(self.rate, owner).reset_time
            wait = max(1, math.ceil(reset - time.time()))
            raise HTTPException(429, f"more than {self.rate}: wait {wait} s", {"Retry-After": str(wait)})


async def _caller(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    key: Annotated[str | None, Security(_header)],
) -> str:
    """The guard has let the request in already; the parameters are for OpenAPI to name."""
    owner: str = request.state.owner
    return owner


Caller = Annotated[str, Depends(_caller)]
"""The owner of a request, in a route's parameters."""


class Guard:
    """ASGI middleware, by headers alone: nothing of a body is read before its sender has been let in.

    Without keys only this machine's own programs may call: pages of other sites (by Origin) and names that were made
    to point here (by Host) are refused.
    """

    def __init__(self, app: ASGIApp, gate: Gate, guarded: str = "/v1/") -> None:
        self.app, self.gate, self.guarded = app, gate, guarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self.guarded):
            try:
                headers = Headers(scope=scope)
                if not self.gate.keys:
                    require_local(headers)
                host = scope["client"][0] if scope.get("client") else "unknown"
                scope.setdefault("state", {})["owner"] = self.gate.owner(_key(headers), host)
            except HTTPException as error:
                refusal = problem(error.status_code, str(error.detail), dict(error.headers or {}))
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _key(headers: Headers) -> str | None:
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else headers.get("x-api-key")


def require_local(headers: Headers) -> None:
    """Raises 403 for a request that another site's page, or a name made to point here, has sent."""
    for name in ("host", "origin"):
        given = headers.get(name)
        if given is not None and urlsplit(given if "//" in given else f"//{given}").hostname not in LOCAL:
            raise HTTPException(403, f"without API keys this server answers its own machine only, not {name} {given!r}")


class BodyLimits:
    """ASGI middleware: 413 for a form above ``form`` bytes or another body above ``other``, 408 for a body that is not
    there after ``seconds``."""

    def __init__(self, app: ASGIApp, form: int, other: int, seconds: float) -> None:
        self.app, self.form, self.other, self.seconds = app, form, other, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        largest = self.form if is_form else self.other
        left, complete, until = largest, False, time.monotonic() + self.seconds
        sentence = f"the request is larger than {largest / 2**20:.3g} MiB: send fewer or smaller files"
        claimed = headers.get("content-length", "0")

        async def limited() -> Message:
            nonlocal left, complete
            if complete:
                return await receive()
            if claimed.isdecimal() and int(claimed) > largest:
                raise HTTPException(413, sentence)
            try:
                message: Any = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                raise HTTPException(408, f"the request was not complete after {self.seconds:g} s") from None
            left -= len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if left < 0:
                raise HTTPException(413, sentence)
            return message

        await self.app(scope, limited, send)
