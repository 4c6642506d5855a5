"""Senders of slow images and of nothing against a real server process: how long others wait.

    python -m benchmarks.robustness.slow_senders [--num-attackers 3] [--num-photos 10]

Attackers send JPEGs of 40 KB with as many scans as are read, of 24 megapixels, again and again.
Meanwhile ordinary photos are sent one after the other. Then connections that send nothing are
opened, and ``/healthz`` is asked. Prints two tables; exits 1 if the median photo takes longer than
twice as long as before, or ``/healthz`` is not answered. All of it stays on this machine.
"""

import argparse
import asyncio
import io
import socket
import statistics
import time
from contextlib import ExitStack
from typing import Final

import httpx
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.service_process import get_memory_mib, start_server

MAX_ATTACK_S: Final = 120
SLOWDOWN_LIMIT: Final = 2.0


def make_photo(index: int) -> bytes:
    """Make an ordinary JPEG of two megapixels."""
    pixels = np.random.default_rng(index).integers(0, 255, (120, 160, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((1600, 1200)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_slow_photo(num_scans: int = 99, size: int = 4900) -> bytes:
    """Make a progressive JPEG that is small, claims to be large, and has many scans."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    place = data.index(b"\xff\xc2") + 5  # height and width
    data = data[:place] + size.to_bytes(2, "big") * 2 + data[place + 4 :]
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last_scan * (num_scans - data.count(b"\xff\xda")) + data[-2:]


async def send_photo(client: httpx.AsyncClient, photo: bytes) -> tuple[int, float]:
    """Ask for the LoRA of a photo; return the status and the seconds."""
    start_time = time.perf_counter()
    response = await client.post("/v1/loras", files={"photos": photo})
    return response.status_code, time.perf_counter() - start_time


async def measure_photos(client: httpx.AsyncClient, num_photos: int) -> list[float]:
    """Measure ordinary photos one after the other; all must be answered."""
    results = [await send_photo(client, make_photo(i)) for i in range(num_photos)]
    assert {status for status, _ in results} == {200}, results
    return [seconds for _, seconds in results]


async def measure_attack(url: str, num_attackers: int, num_photos: int) -> dict[str, list[float]]:
    """Measure photos before, while and just after slow images are sent."""
    slow_photo, times = make_slow_photo(), {}
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def attack() -> None:
            deadline = time.monotonic() + MAX_ATTACK_S
            while time.monotonic() < deadline:
                await send_photo(client, slow_photo)

        await measure_photos(client, 4)  # all processes are started
        times["before"] = await measure_photos(client, num_photos)
        tasks = [asyncio.create_task(attack()) for _ in range(num_attackers)]
        await asyncio.sleep(2)
        times["under attack"] = await measure_photos(client, num_photos)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        times["attackers left"] = await measure_photos(client, 1)
    return times


def count_answers(url: str, num_idle: int, num_questions: int = 5) -> tuple[int, float]:
    """Open idle connections; count the answers of ``/healthz``, and measure the longest."""
    address = (url.split("/")[-1].split(":")[0], int(url.rsplit(":", 1)[1]))
    num_answers, longest_s = 0, 0.0
    with ExitStack() as stack:
        for _ in range(num_idle):
            stack.enter_context(socket.create_connection(address, 10))
        for _ in range(num_questions):
            start_time = time.perf_counter()
            num_answers += httpx.get(f"{url}/healthz", timeout=10).status_code == 200
            longest_s = max(longest_s, time.perf_counter() - start_time)
            time.sleep(1)
    return num_answers, longest_s


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-attackers", type=int, default=3)
    parser.add_argument("--num-photos", type=int, default=10)
    parser.add_argument("--num-idle", type=int, default=1030)
    arguments = parser.parse_args()
    with start_server("--no-ui", "--no-edits") as (url, pid):
        times = asyncio.run(measure_attack(url, arguments.num_attackers, arguments.num_photos))
        memory_mib = get_memory_mib(pid)
        num_answers, longest_s = count_answers(url, arguments.num_idle)
    table = Table("photos", "number", "median", "longest")
    for name, seconds in times.items():
        table.add_row(
            name, str(len(seconds)), f"{statistics.median(seconds):.2f} s", f"{max(seconds):.2f} s"
        )
    console = Console(width=100)
    console.print(table)
    console.print(f"memory of the server: {memory_mib:.0f} MiB")
    idle_table = Table("idle connections", "/healthz asked", "answered", "longest")
    idle_table.add_row(str(arguments.num_idle), "5", str(num_answers), f"{longest_s:.2f} s")
    console.print(idle_table)
    slowdown = statistics.median(times["under attack"]) / statistics.median(times["before"])
    print(f"an ordinary photo under attack takes {slowdown:.2f} times as long")
    raise SystemExit(slowdown > SLOWDOWN_LIMIT or num_answers < 5)


if __name__ == "__main__":
    main()
