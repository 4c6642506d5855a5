"""The service under load, on the avatars bundle: real HTTP, one server process started here.

    python benchmarks/serving.py loras|pictures|overhead|soak [--seconds 20]

loras     POST /v1/loras at 32 clients against 1: ratio of photos/s, p50 and p99
pictures  8 people's pictures drawn together against one after another: ratio, and the largest difference of pixels
overhead  one client's POST /v1/loras against the call in Python
soak      --seconds at about 80 % of the load that 8 clients reach: errors, memory at the start and at the end
"""

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np

from hyperlora import pretrained
from hyperlora.client import AsyncClient, Client


def photos() -> list[bytes]:
    """The first photo of every test person."""
    folders = sorted((pretrained.BENCHMARK / "subjects").iterdir())
    return [min(folder.iterdir()).read_bytes() for folder in folders]


@contextmanager
def server(*options: str) -> Iterator[tuple[str, int]]:
    """(url, process id) of a server on a free port, started with these ``options`` too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as state, open(os.devnull, "w") as nowhere:
        verb = [str(Path(sys.executable).with_name("hyperlora")), "serve"]
        command = [*verb, "--port", str(port), "--state", state, "--rate", "1000000/minute", *options]
        process = subprocess.Popen(command, stderr=nowhere)
        try:
            for _ in range(600):
                try:
                    if httpx.get(url + "/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(60)


async def load(url: str, people: list[bytes], clients: int, seconds: float, pause: float = 0.0) -> list[float]:
    """Latencies of all requests that ``clients`` send one after another for ``seconds``."""
    latencies: list[float] = []
    opened = [AsyncClient(url) for _ in range(clients)]  # takes tens of milliseconds each, so before the clock runs
    until = time.perf_counter() + seconds

    async def one(number: int, client: AsyncClient) -> None:
        async with client:
            for i in range(10**9):
                if (began := time.perf_counter()) > until:
                    return
                await client.make_lora([people[(number + i) % len(people)]])
                latencies.append(time.perf_counter() - began)
                await asyncio.sleep(pause)

    await asyncio.gather(*(one(i, client) for i, client in enumerate(opened)))
    return latencies


def loras(seconds: float) -> None:
    people = photos()
    with server() as (url, pid):
        asyncio.run(load(url, people, 4, 2))
        rates, costs = {}, {}
        for clients in (1, 32, 1, 32):  # twice, so that a drift shows
            spent = processor_time(pid)
            found = asyncio.run(load(url, people, clients, seconds / 4))
            rates[clients] = clients / statistics.mean(found)  # each always has one request under way
            costs[clients] = (processor_time(pid) - spent) / len(found) * 1000
            p50, p99 = np.percentile(found, [50, 99]) * 1000
            rate = f"{clients} clients: {rates[clients]:.1f} LoRAs/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms"
            print(f"{rate} ({p99 / p50:.1f}x), {costs[clients]:.1f} ms of the server's processors each")
        ratio = f"32 against 1: {rates[32] / rates[1]:.2f}x"
        print(f"{ratio} ({costs[1] / costs[32]:.2f}x per second of the server's processors)")


def pictures(seconds: float) -> None:
    people = photos()[:8]
    with server() as (url, pid), Client(url) as client:
        made = [client.make_lora([photo]) for photo in people]
        prompt = "a portrait of sks person, smiling"

        def alone() -> list[np.ndarray]:
            return [np.asarray(client.draw(prompt, [lora], seed=i)) for i, lora in enumerate(made)]

        async def together() -> list[np.ndarray]:
            async with AsyncClient(url) as many:
                drawn = await asyncio.gather(*(many.draw(prompt, [lora], seed=i) for i, lora in enumerate(made)))
            return [np.asarray(picture) for picture in drawn]

        alone()
        times: dict[str, list[float]] = {"alone": [], "together": []}
        costs: dict[str, list[float]] = {"alone": [], "together": []}
        drawn = {}
        for _ in range(3):
            for name, draw in (("alone", alone), ("together", lambda: asyncio.run(together()))):
                began, spent = time.perf_counter(), processor_time(pid)
                drawn[name] = draw()
                times[name].append(time.perf_counter() - began)
                costs[name].append(processor_time(pid) - spent)
        pairs = zip(drawn["alone"], drawn["together"], strict=True)
        difference = max(np.abs(a.astype(int) - b.astype(int)).max() for a, b in pairs)
        for found, unit in ((times, "s"), (costs, "s of the server's processors")):
            a, b = (statistics.median(found[k]) for k in ("alone", "together"))
            print(f"8 pictures: one after another {a:.2f} {unit}, together {b:.2f}: {a / b:.2f}x")
        print(f"differ by {difference}/255")


def overhead(seconds: float) -> None:
    from hyperlora.data.images import read_image
    from hyperlora.lora.io.save import lora_bytes
    from hyperlora.pipelines.generate import Photos, Settings, generate, header_of
    from hyperlora.pipelines.image_to_lora import ImageToLora

    people = photos()
    model = ImageToLora.from_pretrained(pretrained.MODEL)

    def call(photo: bytes) -> bytes:
        weights = generate(model, [Photos.of([read_image(photo)], model)], Settings())[0]
        return lora_bytes(weights, header=header_of(model, "LoRA", [photo]))

    with server() as (url, _), Client(url) as client:
        times: dict[str, list[float]] = {"python": [], "service": []}
        for i in range(60):
            for name, make in (("python", call), ("service", lambda photo: client.make_lora([photo]))):
                began = time.perf_counter()
                make(people[i % len(people)])
                times[name].append(time.perf_counter() - began)
        a, b = (statistics.median(times[k][10:]) * 1000 for k in ("python", "service"))
        print(f"python {a:.1f} ms, service {b:.1f} ms: {b - a:.1f} ms more")


def soak(seconds: float) -> None:
    people = photos()
    with server() as (url, pid):
        fast = asyncio.run(load(url, people, 8, 10))
        pause = statistics.mean(fast) * 0.25  # 8 clients at 80 % of what they can
        asyncio.run(load(url, people, 8, 10, pause))
        before = memory(pid)
        found = asyncio.run(load(url, people, 8, seconds, pause))
        after = memory(pid)
        grown = f"memory {before:.0f} to {after:.0f} MiB ({after / before - 1:+.1%})"
        print(f"{len(found)} requests in {seconds:.0f} s, no error; {grown}")


def memory(pid: int) -> float:
    """Resident memory of a process in MiB."""
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def processor_time(pid: int) -> float:
    """Seconds that a process has computed so far, on all processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parts = {"loras": loras, "pictures": pictures, "overhead": overhead, "soak": soak}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=parts)
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    parts[arguments.part](arguments.seconds)


if __name__ == "__main__":
    main()
