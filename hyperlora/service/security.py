"""API keys and rates of callers; sizes and times of request bodies."""

import asyncio
import hmac
import math
import time
from collections.abc import Mapping
from typing import Annotated, Final, NoReturn
from urllib.parse import urlsplit

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials
from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hyperlora.service.errors import make_problem
from hyperlora.service.json_limits import JsonBody
from hyperlora.service.settings import hash_key

LOCAL_HOSTS: Final = frozenset({"127.0.0.1", "localhost", "::1"})
"""Host names of this machine."""
_UPLOAD_TYPE: Final = b"multipart/form-data"
_FORM_TYPES: Final = frozenset({_UPLOAD_TYPE, b"application/x-www-form-urlencoded"})
_UTF_8_NAMES: Final = frozenset({"utf-8", "utf8"})
_bearer = HTTPBearer(auto_error=False, description="An API key, if the server asks for one.")
_header = APIKeyHeader(
    name="X-API-Key", auto_error=False, description="The same, for tools without bearer tokens."
)


class ApiKeyAuth:
    """API keys, and a rate limit for each.

    Args:
        key_digests: SHA-256 digests of the keys; without any, every key is accepted.
        rate_limit: Requests per owner in the notation of the ``limits`` library: ``60/minute``.
    """

    def __init__(self, key_digests: frozenset[bytes], rate_limit: str) -> None:
        self.key_digests, self.rate_limit = key_digests, parse(rate_limit)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def authenticate(self, key: str | None, host: str) -> str:
        """Find the owner of a request, and count the request.

        Args:
            key: The key that was sent; None for none.
            host: Address of the caller.

        Returns:
            A digest of the key, or the host if the server has no keys.

        Raises:
            HTTPException: 401 for an unknown key, 429 above the rate limit.
        """
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

    def count_sign_in(self, host: str) -> None:
        """Count an attempt to sign in, before anything of it is read.

        Args:
            host: Address of the visitor.

        Raises:
            HTTPException: 429 above the rate limit.
        """
        self._check_rate_limit(f"sign-in at {host}")

    def is_valid(self, key: str | None) -> bool:
        """Check whether this is one of the keys; it counts no request."""
        key_digest = hash_key(key or "")
        # every digest is compared, however early one matches: the time reveals nothing
        matches = [hmac.compare_digest(key_digest, known) for known in self.key_digests]
        return any(matches)

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
    """Return the owner that ``AuthMiddleware`` found; the other parameters are for OpenAPI."""
    owner: str = request.state.owner
    return owner


Caller = Annotated[str, Depends(_get_caller)]
"""The owner of a request, in a route's parameters."""


class AuthMiddleware:
    """ASGI middleware that checks the headers of a request before any of its body is read.

    Without keys only programs of this machine may call: it refuses pages of other sites (by
    Origin) and host names that were made to point here (by Host).

    Args:
        app: The application.
        auth: API keys and rates.
        path_prefix: Paths that are checked.
    """

    def __init__(self, app: ASGIApp, auth: ApiKeyAuth, path_prefix: str = "/v1/") -> None:
        self.app, self.auth, self.path_prefix = app, auth, path_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, or answer 401, 403 or 429."""
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
    """Check that a request comes from a program of this machine.

    A page may call the server that served it, and no other: its Origin has Host's name and port.

    Args:
        headers: The headers of the request.

    Raises:
        HTTPException: 403 for a request of another site's page or to another host name.
    """
    host, origin = headers.get("host"), headers.get("origin")
    default_port = 443 if origin is not None and origin.startswith("https:") else 80
    own_address = None if host is None else _parse_address(f"//{host}", default_port)
    if host is not None and (own_address is None or own_address[0] not in LOCAL_HOSTS):
        _refuse_header("host", host)
    if origin is not None:
        address = _parse_address(origin, default_port)
        if address is None or address != own_address:
            _refuse_header("origin", origin)


def _refuse_header(name: str, value: str) -> NoReturn:
    raise HTTPException(
        403, f"without API keys this server answers its own machine only, not {name} {value!r}"
    )


def _parse_address(url: str, default_port: int) -> tuple[str, int] | None:
    """Parse host name and port of a URL; None if it has no host or cannot be parsed."""
    try:
        parts = urlsplit(url)
        port = default_port if parts.port is None else parts.port
    except ValueError:  # an open bracket, or a port that is no number
        return None
    return None if parts.hostname is None else (parts.hostname, port)


def check_form_charset(headers: Headers) -> None:
    """Check that the fields of a form are UTF-8, as browsers send them.

    Form parsers take any codec of Python by name, and some need quadratic time.

    Args:
        headers: The headers of the request.

    Raises:
        HTTPException: 415 for another charset.
    """
    media_type, parameters = parse_options_header(headers.get("content-type"))
    charset = parameters.get(b"charset", b"utf-8").decode("latin-1")
    if media_type in _FORM_TYPES and charset.lower() not in _UTF_8_NAMES:
        raise HTTPException(
            415, f"the form has the charset {charset[:40]!r}, UTF-8 expected: leave charset out"
        )


class BodyLimitMiddleware:
    """ASGI middleware that limits the size and the time of request bodies.

    It answers 413 for a body that is too large, 408 for one that is not complete in time, and 415
    for one that is not UTF-8. What is no form is taken for JSON; see ``check_json``.

    Args:
        app: The application.
        max_form_bytes: Largest form.
        max_json_bytes: Largest body of another type.
        timeout_s: Seconds until the body is complete.
        max_bytes_by_path: Largest body of any type of the paths that take others.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_form_bytes: int,
        max_json_bytes: int,
        timeout_s: float,
        max_bytes_by_path: Mapping[str, int] | None = None,
    ) -> None:
        self.app, self.timeout_s = app, timeout_s
        self.max_form_bytes, self.max_json_bytes = max_form_bytes, max_json_bytes
        self.max_bytes_by_path = max_bytes_by_path or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application over a limited body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            check_form_charset(headers)
        except HTTPException as error:
            await make_problem(error.status_code, str(error.detail))(scope, receive, send)
            return
        media_type, _ = parse_options_header(headers.get("content-type"))
        max_bytes = self.max_form_bytes if media_type == _UPLOAD_TYPE else self.max_json_bytes
        max_bytes = self.max_bytes_by_path.get(scope["path"], max_bytes)
        body = _LimitedBody(receive, max_bytes, self.timeout_s, headers.get("content-length", "0"))
        is_form = media_type in _FORM_TYPES
        await self.app(scope, body.receive if is_form else JsonBody(body.receive).receive, send)


class _LimitedBody:
    """The body of one request, read up to a size and a time."""

    def __init__(
        self, receive: Receive, max_bytes: int, timeout_s: float, content_length: str
    ) -> None:
        self._receive, self._timeout_s, self._content_length = receive, timeout_s, content_length
        self._max_bytes = self._remaining_bytes = max_bytes
        self._deadline, self._is_complete = time.monotonic() + timeout_s, False

    async def receive(self) -> Message:
        """Receive the next message; raise 413 or 408 at a limit."""
        if self._is_complete:
            return await self._receive()
        if self._content_length.isdecimal() and int(self._content_length) > self._max_bytes:
            raise self._make_size_error()
        remaining_s = max(0.0, self._deadline - time.monotonic())
        try:
            message: Message = await asyncio.wait_for(self._receive(), remaining_s)
        except TimeoutError:
            raise HTTPException(
                408, f"the request was not complete after {self._timeout_s:g} s"
            ) from None
        self._remaining_bytes -= len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._remaining_bytes < 0:
            raise self._make_size_error()
        return message

    def _make_size_error(self) -> HTTPException:
        size_mib = self._max_bytes / 2**20
        return HTTPException(
            413, f"the request is larger than {size_mib:.3g} MiB: send fewer or smaller files"
        )
