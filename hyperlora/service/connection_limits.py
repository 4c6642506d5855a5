"""Connections that send nothing end, and no address may hold them all.

uvicorn ends neither connections that never send a request nor heads of a byte a second. Its
protocol over httptools, which it takes where that is installed, does not limit headers either.
"""

import asyncio
from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

from hyperlora.service.errors import make_problem

_MIN_OPEN_FILES: Final = 4096
_IPV6_PREFIX_LENGTH: Final = 64
"""One customer of a provider has so many bits of an address, and may choose the others."""


def _make_refusal() -> bytes:
    response = make_problem(
        503,
        "as many requests are under way as may be, from here or in all: ask again in a moment",
        {"Retry-After": "5", "Connection": "close"},
    )
    headers = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
    return b"HTTP/1.1 503 Service Unavailable\r\n%s\r\n%s" % (headers, response.body)


_REFUSAL: Final = _make_refusal()


class ConnectionLimits:
    """The open connections of a server, and how many and how long they may be.

    A connection above a limit takes the place of one without a request: of those that never had
    one before those between two, and of the one that has waited longest. So those who send
    requests get in, and ``/healthz`` is answered. If all others have requests, the new one gets
    503.

    Args:
        max_per_address: Connections of one address, an IPv6 network of 64 bits counting as one;
            0 for no limit, where all come from one proxy.
        max_connections: Connections of all addresses.
        head_timeout_s: Seconds until the head of a request is complete, from the start of the
            connection or the last answer.
    """

    def __init__(
        self,
        max_per_address: int = 128,
        max_connections: int = 1024,
        head_timeout_s: float = 10.0,
    ) -> None:
        self.max_per_address, self.max_connections = max_per_address, max_connections
        self.head_timeout_s = head_timeout_s
        self._by_address: dict[str, dict[LimitedProtocol, None]] = {}  # the oldest first

    @property
    def num_connections(self) -> int:
        """Number of open connections."""
        return sum(map(len, self._by_address.values()))

    def add(self, connection: "LimitedProtocol") -> None:
        """Add a connection; at a limit another one ends, or this one is refused."""
        neighbors = self._by_address.setdefault(connection.address, {})
        neighbors[connection] = None
        if self.max_per_address and len(neighbors) > self.max_per_address:
            self._end_oldest_idle(neighbors)
        elif self.num_connections > self.max_connections:
            groups: list[dict[LimitedProtocol, None]] = sorted(self._by_address.values(), key=len)
            self._end_oldest_idle(groups[-1])

    def remove(self, connection: "LimitedProtocol") -> None:
        """Forget a connection that has ended."""
        neighbors = self._by_address.get(connection.address, {})
        neighbors.pop(connection, None)
        if not neighbors:
            self._by_address.pop(connection.address, None)

    def _end_oldest_idle(self, connections: Iterable["LimitedProtocol"]) -> None:
        *others, newest = connections
        idle = [other for other in others if other.is_idle]
        connection = min(idle, key=lambda other: other.idle_rank, default=newest)
        self.remove(connection)
        if connection is newest:
            connection.transport.write(_REFUSAL)
            connection.transport.close()
        else:
            connection.transport.abort()


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 connection with limits.

    Args:
        limits: The limits of the server.
        arguments: Those of ``H11Protocol``.
    """

    def __init__(self, *, limits: ConnectionLimits, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.limits, self.address = limits, ""
        self._head_timer: asyncio.TimerHandle | None = None
        self._idle_since = 0.0

    @property
    def idle_rank(self) -> tuple[bool, float]:
        """Which idle connection ends first: the lowest."""
        return self.cycle is not None, self._idle_since

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way: its head is not complete, or it has its answer."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and wait for the head of its first request."""
        super().connection_made(transport)
        self.address = _get_network(self.client[0] if self.client else "")
        self._idle_since = self.loop.time()
        self._update_head_timer()
        self.limits.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self.limits.remove(self)
        self._stop_head_timer()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Handle what was received; the head of a request stops the timer."""
        super().handle_events()
        self._update_head_timer()

    def on_response_complete(self) -> None:
        """Wait for the head of the next request."""
        super().on_response_complete()
        self._idle_since = self.loop.time()
        self._update_head_timer()

    def _update_head_timer(self) -> None:
        if not self.is_idle:
            self._stop_head_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            timeout_s = self.limits.head_timeout_s
            self._head_timer = self.loop.call_later(timeout_s, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _get_network(host: str) -> str:
    """Return an IPv4 address as it is, and the network of an IPv6 address."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:  # a name of a socket file
        return host
    if not isinstance(address, IPv6Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ip_network((address, _IPV6_PREFIX_LENGTH), strict=False))


def raise_open_file_limit() -> None:
    """Let the process open as many files as its connections need, where the system has a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_unlimited = hard_limit == resource.RLIM_INFINITY
    wanted = _MIN_OPEN_FILES if is_unlimited else min(_MIN_OPEN_FILES, hard_limit)
    if soft_limit != resource.RLIM_INFINITY and soft_limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard_limit))
