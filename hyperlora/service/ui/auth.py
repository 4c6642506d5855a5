"""``UiAuthMiddleware``: who may see the page.

A server with API keys asks for one; a server without any shows the page to this machine only.
"""

import html
import re
from typing import Final
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from hyperlora.service.errors import make_problem
from hyperlora.service.security import ApiKeyAuth, check_local
from hyperlora.service.ui.sessions import COOKIE_NAME, LIFETIME_S, Sessions
from hyperlora.service.ui.text import SIGN_IN
from hyperlora.service.ui.upload_folder import UploadFolder

_MAX_SIGN_IN_BYTES: Final = 10_000
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_SITES: Final = frozenset({"same-origin", "none"})
"""Values of Sec-Fetch-Site in requests that no other page started."""
_CORS_PREFIX: Final = b"access-control-"
_MAX_SIGN_IN_FIELDS: Final = 10
_URL: Final = re.compile(r"/(file|proxy)[=/]\s*[a-z][a-z+.-]+:", re.IGNORECASE)
"""An address in a path such as ``/gradio_api/file=https://...``; Windows paths have one letter."""
_SIGN_IN_TYPE: Final = "application/x-www-form-urlencoded"
_SECURITY_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class UiAuthMiddleware:
    """ASGI middleware around the page and its uploads.

    A cookie that scripts cannot read and other sites cannot send names the visitor's session. The
    page sends its key to the API, which checks it again. No other page may read an answer or send
    a form, and nobody makes the server fetch an address.

    Args:
        app: The page.
        auth: API keys and rates.
        sessions: Signed-in visitors; None for none yet.
        uploads: The folder of uploads, which counts them; None counts no bytes.
        secure_cookie: Whether the cookie is for HTTPS alone, which a proxy may speak.
    """

    def __init__(
        self,
        app: ASGIApp,
        auth: ApiKeyAuth,
        sessions: Sessions | None = None,
        uploads: UploadFolder | None = None,
        secure_cookie: bool = False,
    ) -> None:
        self.app, self.auth, self.uploads = app, auth, uploads
        self.sessions, self.secure_cookie = sessions or Sessions(), secure_cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the page, or answer with the sign-in form or a problem."""
        response = None
        if scope["type"] == "http":
            response = await self._check_access(scope, receive)
        if response is not None:
            await response(scope, receive, send)
        elif scope["type"] == "websocket":  # the page uses none
            await WebSocketClose()(scope, receive, send)
        else:
            if self.uploads is not None and _is_upload(scope):
                receive = self.uploads.count_upload(receive, scope["state"]["visitor"])
            await self.app(scope, receive, _add_security_headers(send))

    async def _check_access(self, scope: Scope, receive: Receive) -> Response | None:
        """Return the answer to a visitor who may not see the page, None for others."""
        headers = Headers(scope=scope)
        host = scope["client"][0] if scope.get("client") else "unknown"
        try:
            if not self.auth.key_digests:
                check_local(headers)
            _check_own_page(scope["method"], headers)
            _check_no_url(scope["path"])
            if not self.auth.key_digests:
                self._count_upload(scope, None, host)
                return None
            if scope["method"] == "POST" and scope["path"] == "/sign-in":
                return await self._sign_in(Request(scope, receive), host)
            key = self.sessions.find_key(Request(scope).cookies)
            if key is not None and self.auth.is_valid(key):
                self._count_upload(scope, key, host)
                return None
            if scope["path"] == "/":
                return _render_sign_in("")
            self.auth.authenticate(key, host)  # raises, and counts
        except HTTPException as error:
            return make_problem(error.status_code, str(error.detail), dict(error.headers or {}))
        return None

    def _count_upload(self, scope: Scope, key: str | None, host: str) -> None:
        """Count an upload as a request to the API, and remember whose it is."""
        if _is_upload(scope):
            scope.setdefault("state", {})["visitor"] = self.auth.authenticate(key, host)

    async def _sign_in(self, request: Request, host: str) -> Response:
        """Set the cookie of a visitor who sends a valid key; else show the form again."""
        try:
            self.auth.count_sign_in(host)
            key = await _read_key(request)
            self.auth.authenticate(key, host)
        except HTTPException as error:
            is_unknown_key = error.status_code == 401
            message = "this is no API key of this server" if is_unknown_key else str(error.detail)
            return _render_sign_in(message, error.status_code)
        response = RedirectResponse("/", 303, _SECURITY_HEADERS)
        response.set_cookie(
            COOKIE_NAME,
            self.sessions.add(key),
            max_age=LIFETIME_S,
            httponly=True,
            samesite="strict",
            secure=self.secure_cookie or request.url.scheme == "https",
        )
        return response


def _check_own_page(method: str, headers: Headers) -> None:
    """Check that no other page sends a request that changes something; 403 if one does."""
    site = headers.get("sec-fetch-site", "none")
    if method not in _SAFE_METHODS and site not in _OWN_SITES:
        raise HTTPException(403, "a page of another site sent this: use this server's own page")


def _check_no_url(path: str) -> None:
    """Check that a path does not name an address that Gradio would fetch; 403 if it does."""
    if _URL.search(path):
        raise HTTPException(403, "this server fetches no addresses: upload the file itself")


def _is_upload(scope: Scope) -> bool:
    return scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload")


async def _read_key(request: Request) -> str:
    """Read the key of the sign-in form; never hold more than ``_MAX_SIGN_IN_BYTES`` of it."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != _SIGN_IN_TYPE:
        raise HTTPException(
            415, f"the sign-in form is {media_type[:80]!r}, {_SIGN_IN_TYPE} expected"
        )
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > _MAX_SIGN_IN_BYTES:
            raise HTTPException(413, "an API key is shorter than that")
        body += chunk
    try:
        fields = parse_qs(body.decode("utf-8", "replace"), max_num_fields=_MAX_SIGN_IN_FIELDS)
    except ValueError as error:
        raise HTTPException(400, "the sign-in form has too many fields: send key only") from error
    return fields.get("key", [""])[0].strip()


def _render_sign_in(message: str, status: int = 200) -> Response:
    return HTMLResponse(
        SIGN_IN.replace("SENTENCE", html.escape(message)), status, _SECURITY_HEADERS
    )


def _add_security_headers(send: Send) -> Send:
    """Add the headers of the page, and remove those by which Gradio admits other pages."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            security_headers = [
                (name.lower().encode(), value.encode()) for name, value in _SECURITY_HEADERS.items()
            ]
            own_headers = [
                (name, value)
                for name, value in message.get("headers", [])
                if not name.lower().startswith(_CORS_PREFIX)
            ]
            message["headers"] = [*own_headers, *security_headers]
        await send(message)

    return send_with_headers
