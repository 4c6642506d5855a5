"""``Door``: who may see the page. With API keys it asks for one; without, only this machine may come in."""

import html
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from http.cookies import SimpleCookie
from typing import Final

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hyperlora.service.errors import problem
from hyperlora.service.security import Gate, require_local
from hyperlora.service.ui.text import SIGN_IN

COOKIE: Final = "hyperlora_key"
_PROTECTION: Final = {
    "Content-Security-Policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def key_of(cookies: Mapping[str, str]) -> str | None:
    """The API key that a visitor gave."""
    try:
        return urlsafe_b64decode(cookies.get(COOKIE, "")).decode() or None
    except ValueError:
        return None


class Door:
    """ASGI middleware around the page, also around its uploads. The key stays in a cookie that scripts cannot read and
    other sites cannot send; the page hands it on to the API, which checks it again."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app, self.gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := await self._refusal(scope, receive)) is not None:
            await refusal(scope, receive, send)
        elif scope["type"] != "websocket":
            await self.app(scope, receive, _protecting(send))

    async def _refusal(self, scope: Scope, receive: Receive) -> Response | None:
        headers = Headers(scope=scope)
        host = scope["client"][0] if scope.get("client") else "unknown"
        try:
            if not self.gate.keys:
                require_local(headers)
                return None
            if scope["method"] == "POST" and scope["path"] == "/sign-in":
                return await self._sign_in(Request(scope, receive), host)
            cookie = SimpleCookie(headers.get("cookie", ""))
            key = key_of({name: morsel.value for name, morsel in cookie.items()})
            if key is not None and self.gate.knows(key):
                return None
            if scope["path"] == "/":
                return _form("")
            self.gate.owner(key, host)  # raises, and counts
        except HTTPException as error:
            return problem(error.status_code, str(error.detail), dict(error.headers or {}))
        return None

    async def _sign_in(self, request: Request, host: str) -> Response:
        if int(request.headers.get("content-length", "0") or 0) > 10_000:
            raise HTTPException(413, "an API key is shorter than that")
        key = str((await request.form()).get("key", "")).strip()
        try:
            self.gate.owner(key, host)
        except HTTPException as error:
            known = "this is no API key of this server" if error.status_code == 401 else str(error.detail)
            return _form(known, error.status_code)
        answer = RedirectResponse("/", 303, _PROTECTION)
        value = urlsafe_b64encode(key.encode()).decode()
        answer.set_cookie(COOKIE, value, httponly=True, samesite="strict", secure=request.url.scheme == "https")
        return answer


def _form(sentence: str, status: int = 200) -> Response:
    return HTMLResponse(SIGN_IN.replace("SENTENCE", html.escape(sentence)), status, _PROTECTION)


def _protecting(send: Send) -> Send:
    async def protected(message: Message) -> None:
        if message["type"] == "http.response.start":
            added = [(name.lower().encode(), value.encode()) for name, value in _PROTECTION.items()]
            message["headers"] = [*message.get("headers", []), *added]
        await send(message)

    return protected
