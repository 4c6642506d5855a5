"""Bad requests against a real server process, over sockets: what is answered, and whether the server's memory grows.

    python benchmarks/hostile.py [--count 10000] [--seed 0]

Every answer must be 4xx with a sentence; only a mutated picture may be 200, if it still decodes. A connection closed
without an answer counts as none. Prints a table by class and exits 1 if an answer is not as it must be.
"""

import argparse
import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from attacks import KEYED, OPEN, Random, form, request
from rich.console import Console
from rich.table import Table
from serving import memory, server

CONCURRENCY, NUM_STALLING, WARMUP_FRACTION = 8, 20, 0.15
KEY = "a-right-key-0123456"


async def send_request(port: int, data: bytes) -> tuple[int, str]:
    """(status, sentence) of one request on a connection of its own; status 0 if there is no answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        try:
            writer.write(data)
            await writer.drain()
        except ConnectionError:  # refused before all was sent: the answer may be there already
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
    """Statuses by class, and what should not have been."""

    def __init__(self) -> None:
        self.statuses: dict[str, Counter[int]] = {}
        self.failures: list[str] = []

    def add(self, name: str, status: int, detail: str, request_bytes: bytes) -> None:
        self.statuses.setdefault(name, Counter())[status] += 1
        is_valid_image = status == 200 and name == "mutated pictures"
        if not is_valid_image and (not 400 <= status < 500 or len(detail.split()) < 3):
            self.failures.append(f"{name}: {status} {detail[:120]!r} to {request_bytes[:100]!r}")


async def send_requests(
    port: int,
    classes: dict[str, Callable[[Random], bytes]],
    count: int,
    random: Random,
    report: RequestReport,
) -> None:
    """``count`` requests of the classes in turn, ``CONCURRENCY`` at a time."""
    queue = iter([list(classes)[i % len(classes)] for i in range(count)])

    async def send_next() -> None:
        for name in queue:
            data = classes[name](random)
            report.add(name, *await send_request(port, data), data)

    await asyncio.gather(*(send_next() for _ in range(CONCURRENCY)))


async def send_stalling_requests(port: int, report: RequestReport) -> None:
    """Bodies that never end: the server says so after a minute."""
    data = request("/v1/loras", form(("photos", b"x" * 1000))[:500], content_length="5000")
    for status, sentence in await asyncio.gather(
        *(send_request(port, data) for _ in range(NUM_STALLING))
    ):
        report.add("stalled", status, sentence, data)


async def close_connections_early(port: int, count: int) -> None:
    """Callers that are gone before their body ends: there is nobody to answer."""
    for _ in range(count):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            request("/v1/loras", form(("photos", b"x" * 9000))[:4000], content_length="9999")
        )
        await writer.drain()
        writer.close()


async def run_attack(
    url: str,
    pid: int,
    classes: dict[str, Callable[[Random], bytes]],
    count: int,
    seed: int,
    report: RequestReport,
) -> tuple[float, float]:
    """Memory of the server, MiB, once warm and at the end."""
    port, random = int(url.rsplit(":", 1)[1]), np.random.default_rng(seed)
    num_warmup = int(count * WARMUP_FRACTION)
    await send_requests(port, classes, num_warmup, random, report)
    before = memory(pid)
    stalled = asyncio.create_task(send_stalling_requests(port, report))
    await close_connections_early(port, 50)
    await send_requests(port, classes, count - num_warmup - NUM_STALLING, random, report)
    await stalled
    return before, memory(pid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report, memory_usage = RequestReport(), []
    with tempfile.NamedTemporaryFile("w") as keys:
        keys.write(KEY)
        keys.flush()
        phases = (((), OPEN, 0.9), (("--keys", keys.name), KEYED, 0.1))
        for options, classes, share in phases:
            with server(*options) as (url, pid):
                count = int(arguments.count * share)
                memory_usage.append(
                    asyncio.run(run_attack(url, pid, classes, count, arguments.seed, report))
                )
                alive = Path(f"/proc/{pid}").exists()
            if not alive:
                report.failures.append("the server died")
    table = Table("class", "requests", "answers")
    for name, statuses in report.statuses.items():
        answers = ", ".join(f"{status or 'none'}: {n}" for status, n in sorted(statuses.items()))
        table.add_row(name, str(statuses.total()), answers)
    table.add_row(
        "all",
        str(sum(s.total() for s in report.statuses.values())),
        f"not as they must be: {len(report.failures)}",
    )
    console = Console(width=120)
    console.print(table)
    for (before, after), name in zip(memory_usage, ("without keys", "with keys"), strict=True):
        print(
            f"memory {name}: {before:.0f} MiB warm, {after:.0f} MiB at the end ({after / before - 1:+.1%})"
        )
    for line in report.failures[:40]:
        print(line)
    raise SystemExit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
