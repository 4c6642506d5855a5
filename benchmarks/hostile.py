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

AT_ONCE, STALLED, WARM = 8, 20, 0.15
KEY = "a-right-key-0123456"


async def answer(port: int, data: bytes) -> tuple[int, str]:
    """(status, sentence) of one request on a connection of its own; status 0 if there is no answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        try:
            writer.write(data)
            await writer.drain()
        except ConnectionError:  # refused before all was sent: the answer may be there already
            pass
        got = await asyncio.wait_for(_read(reader), 90)
    finally:
        writer.close()
    head, _, body = got.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1] if head.startswith(b"HTTP/") else b"0"
    text = body.decode(errors="replace")
    return int(status), str(json.loads(text)["detail"]) if b"problem+json" in head else text


async def _read(reader: asyncio.StreamReader) -> bytes:
    got = b""
    try:
        while part := await reader.read(1 << 20):
            got += part
    except ConnectionError:
        pass
    return got


class Found:
    """Statuses by class, and what should not have been."""

    def __init__(self) -> None:
        self.statuses: dict[str, Counter[int]] = {}
        self.wrong: list[str] = []

    def add(self, name: str, status: int, sentence: str, sent: bytes) -> None:
        self.statuses.setdefault(name, Counter())[status] += 1
        decoded = status == 200 and name == "mutated pictures"
        if not decoded and (not 400 <= status < 500 or len(sentence.split()) < 3):
            self.wrong.append(f"{name}: {status} {sentence[:120]!r} to {sent[:100]!r}")


async def shoot(
    port: int, classes: dict[str, Callable[[Random], bytes]], count: int, random: Random, found: Found
) -> None:
    """``count`` requests of the classes in turn, ``AT_ONCE`` at a time."""
    turns = iter([list(classes)[i % len(classes)] for i in range(count)])

    async def one() -> None:
        for name in turns:
            data = classes[name](random)
            found.add(name, *await answer(port, data), data)

    await asyncio.gather(*(one() for _ in range(AT_ONCE)))


async def stall(port: int, found: Found) -> None:
    """Bodies that never end: the server says so after a minute."""
    data = request("/v1/loras", form(("photos", b"x" * 1000))[:500], content_length="5000")
    for status, sentence in await asyncio.gather(*(answer(port, data) for _ in range(STALLED))):
        found.add("stalled", status, sentence, data)


async def leave(port: int, count: int) -> None:
    """Callers that are gone before their body ends: there is nobody to answer."""
    for _ in range(count):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("/v1/loras", form(("photos", b"x" * 9000))[:4000], content_length="9999"))
        await writer.drain()
        writer.close()


async def siege(
    url: str, pid: int, classes: dict[str, Callable[[Random], bytes]], count: int, seed: int, found: Found
) -> tuple[float, float]:
    """Memory of the server, MiB, once warm and at the end."""
    port, random = int(url.rsplit(":", 1)[1]), np.random.default_rng(seed)
    warm = int(count * WARM)
    await shoot(port, classes, warm, random, found)
    before = memory(pid)
    stalled = asyncio.create_task(stall(port, found))
    await leave(port, 50)
    await shoot(port, classes, count - warm - STALLED, random, found)
    await stalled
    return before, memory(pid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found, grown = Found(), []
    with tempfile.NamedTemporaryFile("w") as keys:
        keys.write(KEY)
        keys.flush()
        shares = (((), OPEN, 0.9), (("--keys", keys.name), KEYED, 0.1))
        for options, classes, share in shares:
            with server(*options) as (url, pid):
                count = int(arguments.count * share)
                grown.append(asyncio.run(siege(url, pid, classes, count, arguments.seed, found)))
                alive = Path(f"/proc/{pid}").exists()
            if not alive:
                found.wrong.append("the server died")
    table = Table("class", "requests", "answers")
    for name, statuses in found.statuses.items():
        answers = ", ".join(f"{status or 'none'}: {n}" for status, n in sorted(statuses.items()))
        table.add_row(name, str(statuses.total()), answers)
    table.add_row(
        "all", str(sum(s.total() for s in found.statuses.values())), f"not as they must be: {len(found.wrong)}"
    )
    console = Console(width=120)
    console.print(table)
    for (before, after), name in zip(grown, ("without keys", "with keys"), strict=True):
        print(f"memory {name}: {before:.0f} MiB warm, {after:.0f} MiB at the end ({after / before - 1:+.1%})")
    for line in found.wrong[:40]:
        print(line)
    raise SystemExit(1 if found.wrong else 0)


if __name__ == "__main__":
    main()
