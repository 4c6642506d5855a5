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

from hyperlora.service.errors import make_problem
from hyperlora.service.settings import hash_key

LOCAL_HOSTS: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_bearer = HTTPBearer(auto_error=False, description="An API key, if the server asks for one.")
_header = APIKeyHeader(
    name="X-API-Key", auto_error=False, description="The same, for tools without bearer tokens."
)


class ApiKeyAuth:
    """Keys and their rates. ``rate_limit`` is in the words of ``limits``: ``60/minute``."""

    def __init__(self, key_digests: frozenset[bytes], rate_limit: str) -> None:
        self.key_digests, self.rate_limit = key_digests, parse(rate_limit)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def authenticate(self, key: str | None, host: str) -> str:
        """Whose request this is: a digest of the key, or the host where no key is asked for. Raises 401 and 429."""
        if not self.key_digests:
            owner = f"host {host}"
        else:
            if not self.is_valid(key):
                self._check_rate_limit(f"unknown at {host}")
                raise HTTPException(
                    401,
                    "an API key of this server is needed: send Authorization: Bearer KEY",
                    {"WWW-Authenticate": "Bearer"},
                )
            owner = hash_key(key or "").hex()[:16]
        self._check_rate_limit(owner)
        return owner

    def is_valid(self, key: str | None) -> bool:
        """Whether this is one of the keys; counts nothing."""
        key_digest = hash_key(key or "")
        return (
            sum(hmac.compare_digest(key_digest, known_digest) for known_digest in self.key_digests)
            > 0
        )  # all of them, however early one fits

    def _check_rate_limit(self, owner: str) -> None:
        if not self._limiter.hit(self.rate_limit, owner):
            reset_time = self._limiter.get_window_stats(self.rate_limit, owner).reset_time
            wait = max(1, math.ceil(reset_time - time.time()))
            raise HTTPException(
                429, f"more than {self.rate_limit}: wait {wait} s", {"Retry-After": str(wait)}
            )


async def _get_caller(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    key: Annotated[str | None, Security(_header)],
) -> str:
    """The guard has let the request in already; the parameters are for OpenAPI to name."""
    owner: str = request.state.owner
    return owner


Caller = Annotated[str, Depends(_get_caller)]
"""The owner of a request, in a route's parameters."""


class AuthMiddleware:
    """ASGI middleware, by headers alone: nothing of a body is read before its sender has been let in.

    Without keys only this machine's own programs may call: pages of other sites (by Origin) and names that were made
    to point here (by Host) are refused.
    """

    def __init__(self, app: ASGIApp, auth: ApiKeyAuth, path_prefix: str = "/v1/") -> None:
        self.app, self.auth, self.path_prefix = app, auth, path_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self.path_prefix):
            try:
                headers = Headers(scope=scope)
                if not self.auth.key_digests:
                    check_local(headers)
                host = scope["client"][0] if scope.get("client") else "unknown"
                scope.setdefault("state", {})["owner"] = self.auth.authenticate(
                    _parse_key(headers), host
                )
            except HTTPException as error:
                response = make_problem(
                    error.status_code, str(error.detail), dict(error.headers or {})
                )
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _parse_key(headers: Headers) -> str | None:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")


def check_local(headers: Headers) -> None:
    """Raises 403 for a request that another site's page, or a name made to point here, has sent."""
    for name in ("host", "origin"):
        value = headers.get(name)
        if (
            value is not None
            and urlsplit(value if "//" in value else f"//{value}").hostname not in LOCAL_HOSTS
        ):
            raise HTTPException(
                403,
                f"without API keys this server answers its own machine only, not {name} {value!r}",
            )


class BodyLimitMiddleware:
    """ASGI middleware: 413 for a form above ``max_form_bytes`` bytes or another body above ``max_body_bytes``, 408 for a body that is not
    there after ``timeout_s``."""

    def __init__(
        self, app: ASGIApp, max_form_bytes: int, max_body_bytes: int, timeout_s: float
    ) -> None:
        self.app, self.max_form_bytes, self.max_body_bytes, self.timeout_s = (
            app,
            max_form_bytes,
            max_body_bytes,
            timeout_s,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        max_bytes = self.max_form_bytes if is_form else self.max_body_bytes
        left, complete, deadline = max_bytes, False, time.monotonic() + self.timeout_s
        detail = (
            f"the request is larger than {max_bytes / 2**20:.3g} MiB: send fewer or smaller files"
        )
        content_length = headers.get("content-length", "0")

        async def read_with_limit() -> Message:
            nonlocal left, complete
            if complete:
                return await receive()
            if content_length.isdecimal() and int(content_length) > max_bytes:
                raise HTTPException(413, detail)
            try:
                message: Any = await asyncio.wait_for(
                    receive(), max(0.0, deadline - time.monotonic())
                )
            except TimeoutError:
                raise HTTPException(
                    408, f"the request was not complete after {self.timeout_s:g} s"
                ) from None
            left -= len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if left < 0:
                raise HTTPException(413, detail)
            return message

        await self.app(scope, read_with_limit, send)
