"""The sign-in form, which is read from visitors without a key."""

import asyncio
import time
from base64 import urlsafe_b64decode
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse

from hyperlora.service.errors import install_handlers
from hyperlora.service.security import ApiKeyAuth, BodyLimitMiddleware
from hyperlora.service.settings import hash_key
from hyperlora.service.ui.auth import UiAuthMiddleware
from hyperlora.service.ui.sessions import COOKIE_NAME, LIFETIME_S, Sessions
from tests.service.conftest import StartClient, assert_problem, post_photos

KEY = "a-long-enough-key"
FORM_TYPE = "application/x-www-form-urlencoded"


def make_app(rate_limit: str = "1000/minute", **options: Any) -> FastAPI:
    """Make an app whose page is one line behind the sign-in form."""
    auth = ApiKeyAuth(frozenset({hash_key(KEY)}), rate_limit)
    app = FastAPI()
    install_handlers(app)
    app.add_middleware(
        BodyLimitMiddleware, max_form_bytes=1 << 20, max_json_bytes=1 << 20, timeout_s=10
    )
    app.mount("/", UiAuthMiddleware(PlainTextResponse("the page"), auth, **options))
    return app


@pytest.fixture
def client() -> TestClient:
    return TestClient(make_app(), base_url="http://localhost", follow_redirects=False)


def sign_in(key: str, **options: Any) -> httpx.Response:
    client = TestClient(make_app(**options), base_url="http://localhost", follow_redirects=False)
    return client.post("/sign-in", data={"key": key})


def test_sign_in_keeps_the_key_out_of_the_cookie() -> None:
    sessions = Sessions()
    values = [sign_in(KEY, sessions=sessions).cookies[COOKIE_NAME] for _ in range(2)]
    assert len(set(values)) == 2 and min(map(len, values)) >= 32
    for value in values:
        for text in (value, urlsafe_b64decode(value + "==").decode("latin-1")):
            assert KEY not in text
        assert sessions.find_key({COOKIE_NAME: value}) == KEY
    assert Sessions().find_key({COOKIE_NAME: values[0]}) is None


@pytest.mark.parametrize(("options", "is_secure"), [({}, False), ({"secure_cookie": True}, True)])
def test_sign_in_makes_cookies_for_https_alone(options: dict[str, bool], is_secure: bool) -> None:
    attributes = sign_in(KEY, **options).headers["set-cookie"].split("; ")
    assert ("Secure" in attributes) == is_secure
    assert {"HttpOnly", "SameSite=strict"} <= set(attributes)


def test_sessions_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, now = Sessions(), time.monotonic()
    session_id = sessions.add(KEY)
    monkeypatch.setattr(time, "monotonic", lambda: now + LIFETIME_S + 60)
    assert sessions.find_key({COOKIE_NAME: session_id}) is None
    monkeypatch.undo()
    monkeypatch.setattr("hyperlora.service.ui.sessions._MAX_SESSIONS", 3)
    session_ids = [sessions.add(f"{KEY} {i}") for i in range(4)]
    keys = [sessions.find_key({COOKIE_NAME: session_id}) for session_id in session_ids]
    assert keys == [None, *(f"{KEY} {i}" for i in range(1, 4))]


def send_messages(
    app: FastAPI, messages: Iterable[dict[str, Any]], content_type: str = FORM_TYPE
) -> tuple[int, int]:
    """Send messages to the sign-in form; return the status and how many were received."""
    statuses: list[int] = []
    num_received = 0
    remaining = iter(messages)

    async def receive() -> dict[str, Any]:
        nonlocal num_received
        num_received += 1
        return next(remaining)

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/sign-in",
        "raw_path": b"/sign-in",
        "root_path": "",
        "http_version": "1.1",
        "query_string": b"",
        "client": ("127.0.0.1", 1),
        "headers": [(b"content-type", content_type.encode())],
    }
    asyncio.run(app(scope, receive, send))
    return statuses[0], num_received


def make_chunks(size: int) -> Iterator[dict[str, Any]]:
    while True:
        yield {"type": "http.request", "body": b"k" * size, "more_body": True}


@pytest.mark.parametrize("size", [1, 999, 60_000])
def test_sign_in_counts_the_bytes_of_chunked_bodies(size: int) -> None:
    status, num_received = send_messages(make_app(), make_chunks(size))
    assert status == 413
    assert num_received == 10_000 // size + 1


def test_sign_in_counts_the_rate_before_the_body() -> None:
    app = make_app("2/minute")
    form = {"type": "http.request", "body": urlencode({"key": "wrong"}).encode()}
    assert [send_messages(app, [form]) for _ in range(2)] == [(401, 1)] * 2
    assert send_messages(app, [form]) == (429, 0)


def test_sign_in_answers_nobody_who_left() -> None:
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"key=", "more_body": True},
        {"type": "http.disconnect"},
    ]
    assert send_messages(make_app(), messages) == (499, 2)


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        (FORM_TYPE, b"key=" + KEY.encode(), 303),
        (f"{FORM_TYPE}; charset=UTF-8", b"key=" + KEY.encode(), 303),
        (FORM_TYPE, b"key=%ED%A0%80\xff", 401),
        (FORM_TYPE, b"", 401),
        (FORM_TYPE, b"&".join([b"key=a"] * 11), 400),
        (f"{FORM_TYPE}; charset=punycode", b"key=a", 415),
        ("multipart/form-data; boundary=b; charset=unicode_escape", b"", 415),
        ("multipart/form-data; boundary=b", b"", 415),
        ("application/json", b'{"key": "a"}', 415),
        ("", b"key=a", 415),
    ],
)
def test_sign_in_takes_plain_forms_only(
    client: TestClient, content_type: str, body: bytes, status: int
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = client.post("/sign-in", content=body, headers=headers)
    assert answer.status_code == status
    assert (COOKIE_NAME in answer.cookies) == (status == 303)


@pytest.mark.parametrize("cookie", ["a@b=1", "a,b=1", f"x; {COOKIE_NAME}=\\xff", "=;;=", '"'])
def test_ui_auth_reads_odd_cookies(client: TestClient, cookie: str) -> None:
    assert 'type="password"' in client.get("/", headers={"Cookie": cookie}).text
    assert_problem(client.get("/x", headers={"Cookie": cookie}), 401, "an API key")


@pytest.mark.parametrize("charset", ["punycode", "unicode_escape", '"idna"', "utf-16", ""])
def test_forms_refuse_other_charsets(start_client: StartClient, charset: str) -> None:
    client = start_client()
    assert post_photos(client).status_code == 200
    for path in ("/v1/loras", "/v1/edits", "/v1/identity-similarity"):
        headers = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
        answer = client.post(path, content=b"--b--\r\n", headers=headers)
        assert_problem(answer, 415, "UTF-8 expected")
