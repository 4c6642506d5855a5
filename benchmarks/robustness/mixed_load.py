"""Requests of which one in ten is hostile, against a server process: what the ordinary ones feel.

    python -m benchmarks.robustness.mixed_load [--num-requests 2000] [--num-clients 4] [--seed 0]

Ordinary clients share one API key, hostile ones another. The ordinary load runs alone first. Then
it runs again, and after each nine requests a hostile one starts. Prints answers by kind of attack,
latencies by kind of ordinary request, and memory of the server with its decoder processes.

Exits 1 after an error of an ordinary request, an answer of 500, a median of one kind or a 99th
percentile of all of more than twice the usual latency, or a growth of memory above 5 %.
"""

import argparse
import asyncio
import itertools
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.robustness.hostile_clients import ATTACKS
from benchmarks.service_process import get_group_memory_mib, start_server
from hyperlora.pretrained import BENCHMARK_DIR

ORDINARY_KEY, HOSTILE_KEY = "ordinary-key-012345", "hostile-key-0123456"
NUM_ORDINARY_PER_HOSTILE: Final = 9
MAX_HOSTILE_AT_ONCE: Final = 8
MAX_SLOWDOWN: Final = 2.0
NUM_WARMUP_ROUNDS: Final = 4
WARMUP_FRACTION: Final = 0.15
MAX_MEMORY_GROWTH: Final = 0.05
_WEIGHTS: Final = {"LoRA": 0.5, "image": 0.2, "stored LoRA": 0.15, "job": 0.1, "models": 0.05}
_PAUSE_S: Final = 0.2


class OrdinaryClients:
    """Clients of one key that send requests of every kind, each one after another.

    Args:
        client: The HTTP client with the key.
        seed: Seed of the kinds and photos.
    """

    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self.client, self.random = client, np.random.default_rng(seed)
        self.photos = [path.read_bytes() for path in sorted(BENCHMARK_DIR.rglob("*.webp"))[:64]]
        self.latencies: dict[str, list[float]] = defaultdict(list)
        self.errors: list[str] = []
        self.image_body: dict[str, Any] = {}
        self.requests: dict[str, Callable[[bytes], Awaitable[None]]] = {
            "LoRA": self.create_lora,
            "image": self.generate_image,
            "stored LoRA": self.store_lora,
            "job": self.run_job,
            "models": self.list_models,
        }

    async def prepare(self) -> None:
        """Store the LoRA of the images."""
        response = await self._send("POST", "/v1/loras", self.photos[0], data={"store": "true"})
        digest = response.headers["etag"].strip('"')
        prompt = "a portrait of sks person, smiling"
        loras = [{"id": digest}]
        self.image_body = {"prompt": prompt, "num_inference_steps": 2, "loras": loras}

    async def run(
        self, num_requests: int, num_clients: int, on_request: Callable[[int], None]
    ) -> None:
        """Send requests from all clients.

        Args:
            num_requests: Number of requests of all clients.
            num_clients: Number of clients.
            on_request: Receives the number of each request when it starts.
        """
        names, weights = list(_WEIGHTS), list(_WEIGHTS.values())
        kinds = self.random.choice(names, num_requests, p=weights)
        queue = iter(enumerate(kinds))

        async def send_next() -> None:
            for i, kind in queue:
                on_request(i)
                await self._measure(str(kind), self.photos[i % len(self.photos)])
                await asyncio.sleep(_PAUSE_S)

        await asyncio.gather(*(send_next() for _ in range(num_clients)))

    async def create_lora(self, photo: bytes) -> None:
        """Ask for the LoRA of a photo."""
        await self._send("POST", "/v1/loras", photo)

    async def generate_image(self, photo: bytes) -> None:
        """Ask for an image of two steps with a stored LoRA."""
        await self._send("POST", "/v1/images", json=self.image_body)

    async def store_lora(self, photo: bytes) -> None:
        """Store a LoRA, get it and delete it."""
        title = f"{self.random.integers(1 << 62)}"  # no other client deletes the same file
        fields = {"store": "true", "title": title}
        response = await self._send("POST", "/v1/loras", photo, data=fields)
        path = f"/v1/loras/{response.headers['etag'][1:-1]}"
        await self._send("GET", path)
        await self._send("DELETE", path)

    async def run_job(self, photo: bytes) -> None:
        """Submit the job of a LoRA, wait for it, and delete the result."""
        headers = {"Prefer": "respond-async"}
        data = {"title": f"{self.random.integers(1 << 62)}"}
        response = await self._send("POST", "/v1/loras", photo, headers=headers, data=data)
        path = response.headers["location"]
        while (job := (await self._send("GET", path)).json())["finished"] is None:
            await asyncio.sleep(0.05)
        await self._send("DELETE", job["result"])

    async def list_models(self, photo: bytes) -> None:
        """List the models."""
        await self._send("GET", "/v1/models")

    async def _send(
        self, method: str, path: str, photo: bytes | None = None, **options: Any
    ) -> httpx.Response:
        files = None if photo is None else {"photos": photo}
        response = await self.client.request(method, path, files=files, **options)
        return response.raise_for_status()

    async def _measure(self, kind: str, photo: bytes) -> None:
        start_time = time.perf_counter()
        try:
            await self.requests[kind](photo)
        except (httpx.HTTPError, TypeError) as error:
            self.errors.append(f"{kind}: {error!r}")
        self.latencies[kind].append(time.perf_counter() - start_time)


class HostileClients:
    """Attacks in turn, some at once.

    Args:
        port: Port of the server.
    """

    def __init__(self, port: int) -> None:
        self.port, self.names = port, itertools.cycle(ATTACKS)
        self.answers: dict[str, Counter[str]] = {name: Counter() for name in ATTACKS}
        self._slots = asyncio.Semaphore(MAX_HOSTILE_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    def start_next(self) -> None:
        """Start the next attack."""
        task = asyncio.create_task(self._run(next(self.names)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait(self) -> None:
        """Wait until all attacks are over."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, name: str) -> None:
        async with self._slots:
            try:
                answer = await ATTACKS[name](self.port, HOSTILE_KEY)
            except httpx.HTTPError as error:
                answer = type(error).__name__
        self.answers[name][answer] += 1


async def measure(
    url: str, pid: int, num_requests: int, num_clients: int, seed: int
) -> tuple[OrdinaryClients, OrdinaryClients, HostileClients, tuple[float, float]]:
    """Run the ordinary load without and with hostile requests.

    Args:
        url: URL of the server.
        pid: Process id of the server.
        num_requests: Number of ordinary and hostile requests.
        num_clients: Number of ordinary clients.
        seed: Seed of the ordinary requests.

    Returns:
        The ordinary clients alone and beside hostile ones, the hostile ones, and the memory in MiB,
        warm and at the end.
    """
    num_ordinary = num_requests - num_requests // (NUM_ORDINARY_PER_HOSTILE + 1)
    options: dict[str, Any] = {"base_url": url, "headers": {"X-API-Key": ORDINARY_KEY}}
    async with httpx.AsyncClient(**options, timeout=120) as client:
        hostile = HostileClients(int(url.rsplit(":", 1)[1]))
        for _ in range(NUM_WARMUP_ROUNDS * len(ATTACKS)):  # until the allocator has all it needs
            hostile.start_next()
        await hostile.wait()
        alone, mixed = OrdinaryClients(client, seed), OrdinaryClients(client, seed)
        await alone.prepare()
        await alone.run(num_ordinary, num_clients, lambda i: None)
        hostile.answers = {name: Counter() for name in ATTACKS}

        def start_hostile(i: int) -> None:
            if i % NUM_ORDINARY_PER_HOSTILE == 0:
                hostile.start_next()

        mixed.image_body, memory_mib = alone.image_body, []
        num_warmup = int(num_ordinary * WARMUP_FRACTION)
        for number in (num_warmup, num_ordinary - num_warmup):
            await mixed.run(number, num_clients, start_hostile)
            await hostile.wait()
            await asyncio.sleep(2)
            memory_mib.append(get_group_memory_mib(pid))
        return alone, mixed, hostile, (memory_mib[0], memory_mib[-1])


def print_answers(console: Console, hostile: HostileClients) -> bool:
    """Print the answers by kind of attack; return whether none is a server's mistake."""
    table = Table("attack", "number", "answers")
    for name, answers in hostile.answers.items():
        texts = [f"{answer}: {number}" for answer, number in sorted(answers.items())]
        table.add_row(name, str(answers.total()), ", ".join(texts))
    console.print(table)
    statuses = set().union(*hostile.answers.values())
    return not statuses & {"500", "ConnectError", "ReadTimeout", "ConnectTimeout"}


def print_latencies(console: Console, alone: OrdinaryClients, mixed: OrdinaryClients) -> float:
    """Print the latencies by kind of ordinary request; return the largest slowdown that counts."""
    table = Table("ordinary requests", "number", "median", "slowdown", "99th", "slowdown")
    slowdowns = []
    for kind in [*_WEIGHTS, "all"]:
        pair = [_get_latencies(clients, kind) for clients in (alone, mixed)]
        if not all(pair):
            continue
        cells = []
        for percentile in (50, 99):
            usual_s, mixed_s = (float(np.percentile(seconds, percentile)) for seconds in pair)
            cells += [f"{usual_s:.3f} to {mixed_s:.3f} s", f"{mixed_s / usual_s:.2f}x"]
            if percentile == 50 or kind == "all":
                slowdowns.append(mixed_s / usual_s)
        table.add_row(kind, str(len(pair[1])), *cells)
    console.print(table)
    return max(slowdowns)


def _get_latencies(clients: OrdinaryClients, kind: str) -> list[float]:
    return [
        s for name, seconds in clients.latencies.items() for s in seconds if kind in (name, "all")
    ]


def write_keys(folder: Path) -> str:
    """Write the keys of both groups of clients to a file."""
    path = folder / "keys"
    path.write_text(f"{ORDINARY_KEY}\n{HOSTILE_KEY}\n")
    return str(path)


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-requests", type=int, default=2000)
    parser.add_argument("--num-clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        start_server("--api-key-file", write_keys(Path(folder))) as (url, pid),
    ):
        alone, mixed, hostile, (before_mib, after_mib) = asyncio.run(
            measure(url, pid, arguments.num_requests, arguments.num_clients, arguments.seed)
        )
    console = Console(width=120)
    is_answered = print_answers(console, hostile)
    slowdown = print_latencies(console, alone, mixed)
    growth = after_mib / before_mib - 1
    errors = alone.errors + mixed.errors
    print(f"memory: {before_mib:.0f} MiB warm, {after_mib:.0f} MiB at the end ({growth:+.1%})")
    print(f"errors of ordinary requests: {len(errors)}; largest slowdown {slowdown:.2f}x")
    for line in errors[:20]:
        print(line)
    is_met = is_answered and slowdown <= MAX_SLOWDOWN and growth <= MAX_MEMORY_GROWTH
    raise SystemExit(0 if is_met and not errors else 1)


if __name__ == "__main__":
    main()
