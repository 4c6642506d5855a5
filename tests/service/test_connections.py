"""Connections that send nothing: they end, and keep nobody out."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import httpx
import pytest
import typer
import uvicorn
from fastapi import FastAPI, Request

from hyperlora.cli.serve import _run_server
from hyperlora.service.connection_limits import ConnectionLimits, LimitedProtocol, _get_network
from tests.service.conftest import assert_problem

Address = tuple[str, int]


def make_app() -> FastAPI:
    app = FastAPI()
    app.state.service = SimpleNamespace(shutdown=Mock())
    app.get("/healthz")(lambda: "ok")

    @app.post("/slow")
    async def read_body(request: Request) -> int:
        return len(await request.body())

    return app


@contextmanager
def start_server(limits: ConnectionLimits, monkeypatch: pytest.MonkeyPatch) -> Iterator[Address]:
    """Run the server of ``hyperlora serve`` with other limits."""
    servers: list[uvicorn.Server] = []
    run = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: servers.append(server))
    with pytest.raises(typer.Exit):
        _run_server(make_app(), "127.0.0.1", 0, 1.0)
    (server,) = servers
    assert server.config.http.func is LimitedProtocol  # type: ignore[union-attr]
    server.config.http = partial(LimitedProtocol, limits=limits)  # type: ignore[assignment]
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=run, args=(server, [listener]), daemon=True)
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join(10)


def is_ended(connection: socket.socket, timeout_s: float = 0.05) -> bool:
    """Whether the server has ended a connection."""
    connection.settimeout(timeout_s)
    try:
        return connection.recv(100) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def send_slowly(connection: socket.socket, data: bytes) -> float:
    """Send a byte at a time; return the seconds until the server ended the connection."""
    start_time = time.monotonic()
    for byte in data:
        with suppress(ConnectionError):
            connection.sendall(bytes([byte]))
        if is_ended(connection):
            break
    return time.monotonic() - start_time


@pytest.mark.parametrize(("limit", "num_idle"), [("max_per_address", 40), ("max_connections", 25)])
def test_idle_connections_keep_nobody_out(
    limit: str, num_idle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = ConnectionLimits(**{limit: 5}, head_timeout_s=60)
    with start_server(limits, monkeypatch) as address, ExitStack() as stack:
        other_address = ("127.0.0.2", 0)
        other = stack.enter_context(socket.create_connection(address, 10, other_address))
        idle = [stack.enter_context(socket.create_connection(address, 10)) for _ in range(num_idle)]
        for _ in range(3):
            assert httpx.get(f"http://127.0.0.1:{address[1]}/healthz").status_code == 200
        assert limits.num_connections <= 6
        assert is_ended(idle[0]) and not is_ended(other)


def test_connections_between_two_requests_outlast_idle_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A caller whose connection was opened before those of its idle neighbors keeps it."""
    limits = ConnectionLimits(max_per_address=5, head_timeout_s=60)
    with start_server(limits, monkeypatch) as address, ExitStack() as stack:
        caller = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{address[1]}"))
        assert caller.get("/healthz").status_code == 200
        (first,) = limits._by_address["127.0.0.1"]
        for _ in range(20):
            stack.enter_context(socket.create_connection(address, 10))
        while len(limits._by_address["127.0.0.1"]) < 5:
            time.sleep(0.01)
        assert caller.get("/healthz").status_code == 200
        assert first in limits._by_address["127.0.0.1"]


def test_connections_without_a_request_end(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ConnectionLimits(head_timeout_s=0.4)
    with start_server(limits, monkeypatch) as address, ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(address, 10))

        assert is_ended(connect(), 10)
        slow = connect()
        slow.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert send_slowly(slow, b"x" * 100) < 4
        # a body that goes on behind its answer
        done = connect()
        done.sendall(b"POST /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        assert b"404" in done.recv(4096)
        assert send_slowly(done, b"x" * 100) < 4
        assert limits.num_connections == 0


def test_busy_connections_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ConnectionLimits(max_per_address=3, head_timeout_s=0.3)
    with start_server(limits, monkeypatch) as address, ExitStack() as stack:
        busy = [stack.enter_context(socket.create_connection(address, 10)) for _ in range(2)]
        for connection in busy:
            connection.sendall(b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n")
        for _ in range(5):
            assert httpx.get(f"http://127.0.0.1:{address[1]}/healthz").status_code == 200
        busy.append(stack.enter_context(socket.create_connection(address, 10)))
        busy[-1].sendall(b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n")
        time.sleep(0.4)
        refused = httpx.get(f"http://127.0.0.1:{address[1]}/healthz")
        assert_problem(refused, 503, "ask again in a moment")
        for connection in busy:
            connection.sendall(b"ab")
            assert b"200 OK" in connection.recv(4096)


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
        ("", ""),
    ],
)
def test_addresses_of_one_customer_count_as_one(host: str, network: str) -> None:
    assert _get_network(host) == network
