"""Malformed requests to a real server process, over sockets: answers, and growth of the server's
memory.

    python -m benchmarks.robustness.malformed_requests [--num-requests 10000] [--seed 0]

Every answer must be 4xx with a sentence; only a mutated image may be 200, if it still decodes. A
connection closed without an answer counts as none. Prints a table by class and exits 1 after an
unexpected answer.
"""

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.robustness.http_requests import Random, build_form, build_request
from benchmarks.robustness.malformed_request_generators import (
    AUTHENTICATED_ATTACKS,
    UNAUTHENTICATED_ATTACKS,
)
from benchmarks.service_process import get_memory_mib, start_server, write_key_file

CONCURRENCY, NUM_STALLING, WARMUP_FRACTION = 8, 20, 0.15


async def send_request(port: int, data: bytes) -> tuple[int, str]:
    """Send one request over a connection of its own.

    Args:
        port: Port of the server.
        data: Bytes of the request.

    Returns:
        Status and sentence of the answer; status 0 without an answer.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        try:
            writer.write(data)
            await writer.drain()
        except ConnectionError:  # closed before all was sent: the answer may be there already
            pass
        response = await asyncio.wait_for(_read_response(reader), 90)
    finally:
        writer.close()
    head, _, body = response.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1] if head.startswith(b"HTTP/") else b"0"
    text = body.decode(errors="replace")
    return int(status), str(json.loads(text)["detail"]) if b"problem+json" in head else text


async def _read_response(reader: asyncio.StreamReader) -> bytes:
    response = b""
    try:
        while chunk := await reader.read(1 << 20):
            response += chunk
    except ConnectionError:
        pass
    return response


class RequestReport:
    """Statuses by class of request, and unexpected answers."""

    def __init__(self) -> None:
        self.statuses: dict[str, Counter[int]] = {}
        self.failures: list[str] = []

    def add(self, name: str, status: int, detail: str, request_bytes: bytes) -> None:
        """Add an answer.

        Args:
            name: Class of the request.
            status: Status of the answer.
            detail: Sentence of the answer.
            request_bytes: Bytes of the request, for the message.
        """
        self.statuses.setdefault(name, Counter())[status] += 1
        is_valid_image = status == 200 and name == "mutated images"
        if not is_valid_image and (not 400 <= status < 500 or len(detail.split()) < 3):
            self.failures.append(f"{name}: {status} {detail[:120]!r} to {request_bytes[:100]!r}")


async def send_requests(
    port: int,
    generators: Mapping[str, Callable[[Random], bytes]],
    num_requests: int,
    random: Random,
    report: RequestReport,
) -> None:
    """Send requests of all classes in turn, ``CONCURRENCY`` at a time.

    Args:
        port: Port of the server.
        generators: Generator of each class.
        num_requests: Number of requests.
        random: Random generator.
        report: Receives the answers.
    """
    queue = iter([list(generators)[i % len(generators)] for i in range(num_requests)])

    async def send_next() -> None:
        for name in queue:
            data = generators[name](random)
            report.add(name, *await send_request(port, data), data)

    await asyncio.gather(*(send_next() for _ in range(CONCURRENCY)))


async def send_stalling_requests(port: int, report: RequestReport) -> None:
    """Send bodies that never end, which the server answers after a minute.

    Args:
        port: Port of the server.
        report: Receives the answers.
    """
    data = build_request(
        "/v1/loras", build_form(("photos", b"x" * 1000))[:500], content_length="5000"
    )
    requests = [send_request(port, data) for _ in range(NUM_STALLING)]
    for status, detail in await asyncio.gather(*requests):
        report.add("stalling", status, detail, data)


async def close_connections_early(port: int, num_connections: int) -> None:
    """Close connections before the body ends.

    Args:
        port: Port of the server.
        num_connections: Number of connections.
    """
    for _ in range(num_connections):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            build_request(
                "/v1/loras",
                build_form(("photos", b"x" * 9000))[:4000],
                content_length="9999",
            )
        )
        await writer.drain()
        writer.close()


async def run_attack(
    url: str,
    pid: int,
    generators: Mapping[str, Callable[[Random], bytes]],
    num_requests: int,
    seed: int,
    report: RequestReport,
) -> tuple[float, float]:
    """Run all requests against a server.

    Args:
        url: URL of the server.
        pid: Process id of the server.
        generators: Generator of each class.
        num_requests: Number of requests.
        seed: Seed of the requests.
        report: Receives the answers.

    Returns:
        Memory of the server in MiB, warm and at the end.
    """
    port, random = int(url.rsplit(":", 1)[1]), np.random.default_rng(seed)
    num_warmup = int(num_requests * WARMUP_FRACTION)
    await send_requests(port, generators, num_warmup, random, report)
    before = get_memory_mib(pid)
    stalling = asyncio.create_task(send_stalling_requests(port, report))
    await close_connections_early(port, 50)
    num_remaining = num_requests - num_warmup - NUM_STALLING
    await send_requests(port, generators, num_remaining, random, report)
    await stalling
    return before, get_memory_mib(pid)


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report, memory_usage = RequestReport(), []
    with write_key_file() as key_file:
        phases = (
            ((), UNAUTHENTICATED_ATTACKS, 0.9),
            (("--api-key-file", key_file), AUTHENTICATED_ATTACKS, 0.1),
        )
        for options, generators, fraction in phases:
            with start_server(*options) as (url, pid):
                num_requests = int(arguments.num_requests * fraction)
                memory_usage.append(
                    asyncio.run(
                        run_attack(url, pid, generators, num_requests, arguments.seed, report)
                    )
                )
                is_alive = Path(f"/proc/{pid}").exists()
            if not is_alive:
                report.failures.append("the server died")
    table = Table("class", "requests", "answers")
    for name, statuses in report.statuses.items():
        answers = ", ".join(f"{status or 'none'}: {n}" for status, n in sorted(statuses.items()))
        table.add_row(name, str(statuses.total()), answers)
    table.add_row(
        "all",
        str(sum(s.total() for s in report.statuses.values())),
        f"unexpected: {len(report.failures)}",
    )
    console = Console(width=120)
    console.print(table)
    for (before, after), name in zip(memory_usage, ("without keys", "with keys"), strict=True):
        print(
            f"memory {name}: {before:.0f} MiB warm, {after:.0f} MiB at the end "
            f"({after / before - 1:+.1%})"
        )
    for line in report.failures[:40]:
        print(line)
    raise SystemExit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
