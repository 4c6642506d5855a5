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


def load_photos() -> list[bytes]:
    """The first photo of every test person."""
    folders = sorted((pretrained.BENCHMARK_DIR / "subjects").iterdir())
    return [min(folder.iterdir()).read_bytes() for folder in folders]


@contextmanager
def start_server(*options: str) -> Iterator[tuple[str, int]]:
    """(url, process id) of a server on a free port, started with these ``options`` too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as state, open(os.devnull, "w") as devnull:
        serve_command = [str(Path(sys.executable).with_name("hyperlora")), "serve"]
        command = [
            *serve_command,
            "--port",
            str(port),
            "--state",
            state,
            "--rate",
            "1000000/minute",
            *options,
        ]
        process = subprocess.Popen(command, stderr=devnull)
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


async def run_load(
    url: str, subject_photos: list[bytes], clients: int, seconds: float, pause: float = 0.0
) -> list[float]:
    """Latencies of all requests that ``clients`` send one after another for ``seconds``."""
    latencies: list[float] = []
    async_clients = [
        AsyncClient(url) for _ in range(clients)
    ]  # takes tens of milliseconds each, so before the clock runs
    end_time = time.perf_counter() + seconds

    async def run_client(number: int, client: AsyncClient) -> None:
        async with client:
            for i in range(10**9):
                if (began := time.perf_counter()) > end_time:
                    return
                await client.create_lora([subject_photos[(number + i) % len(subject_photos)]])
                latencies.append(time.perf_counter() - began)
                await asyncio.sleep(pause)

    await asyncio.gather(*(run_client(i, client) for i, client in enumerate(async_clients)))
    return latencies


def measure_lora_throughput(seconds: float) -> None:
    subject_photos = load_photos()
    with start_server() as (url, pid):
        asyncio.run(run_load(url, subject_photos, 4, 2))
        rates, costs = {}, {}
        for clients in (1, 32, 1, 32):  # twice, so that a drift shows
            cpu_start_s = get_cpu_time_s(pid)
            latencies = asyncio.run(run_load(url, subject_photos, clients, seconds / 4))
            rates[clients] = clients / statistics.mean(
                latencies
            )  # each always has one request under way
            costs[clients] = (get_cpu_time_s(pid) - cpu_start_s) / len(latencies) * 1000
            p50, p99 = np.percentile(latencies, [50, 99]) * 1000
            rate = f"{clients} clients: {rates[clients]:.1f} LoRAs/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms"
            print(
                f"{rate} ({p99 / p50:.1f}x), {costs[clients]:.1f} ms of the server's processors each"
            )
        ratio = f"32 against 1: {rates[32] / rates[1]:.2f}x"
        print(f"{ratio} ({costs[1] / costs[32]:.2f}x per second of the server's processors)")


def measure_image_batching(seconds: float) -> None:
    subject_photos = load_photos()[:8]
    with start_server() as (url, pid), Client(url) as client:
        created_loras = [client.create_lora([photo]) for photo in subject_photos]
        prompt = "a portrait of sks person, smiling"

        def generate_sequentially() -> list[np.ndarray]:
            return [
                np.asarray(client.generate_image(prompt, [lora], seed=i))
                for i, lora in enumerate(created_loras)
            ]

        async def generate_concurrently() -> list[np.ndarray]:
            async with AsyncClient(url) as many:
                drawn = await asyncio.gather(
                    *(
                        many.generate_image(prompt, [lora], seed=i)
                        for i, lora in enumerate(created_loras)
                    )
                )
            return [np.asarray(picture) for picture in drawn]

        generate_sequentially()
        times: dict[str, list[float]] = {"alone": [], "together": []}
        costs: dict[str, list[float]] = {"alone": [], "together": []}
        drawn = {}
        for _ in range(3):
            for name, draw in (
                ("alone", generate_sequentially),
                ("together", lambda: asyncio.run(generate_concurrently())),
            ):
                began, spent = time.perf_counter(), get_cpu_time_s(pid)
                drawn[name] = draw()
                times[name].append(time.perf_counter() - began)
                costs[name].append(get_cpu_time_s(pid) - spent)
        pairs = zip(drawn["alone"], drawn["together"], strict=True)
        difference = max(np.abs(a.astype(int) - b.astype(int)).max() for a, b in pairs)
        for found, unit in ((times, "s"), (costs, "s of the server's processors")):
            a, b = (statistics.median(found[k]) for k in ("alone", "together"))
            print(f"8 pictures: one after another {a:.2f} {unit}, together {b:.2f}: {a / b:.2f}x")
        print(f"differ by {difference}/255")


def measure_overhead(seconds: float) -> None:
    from hyperlora.data.images import read_image
    from hyperlora.lora.io.save import serialize_lora
    from hyperlora.pipelines.config import GenerationConfig
    from hyperlora.pipelines.generate import SubjectPhotos, generate_loras
    from hyperlora.pipelines.image_to_lora import ImageToLora

    subject_photos = load_photos()
    model = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR)

    def generate_lora(photo: bytes) -> bytes:
        weights = generate_loras(
            model, [SubjectPhotos.from_images([read_image(photo)], model)], GenerationConfig()
        )[0]
        return serialize_lora(weights, metadata=model.make_metadata("LoRA", [photo]))

    with start_server() as (url, _), Client(url) as client:
        times: dict[str, list[float]] = {"python": [], "service": []}
        for i in range(60):
            for name, make in (
                ("python", generate_lora),
                ("service", lambda photo: client.create_lora([photo])),
            ):
                began = time.perf_counter()
                make(subject_photos[i % len(subject_photos)])
                times[name].append(time.perf_counter() - began)
        a, b = (statistics.median(times[k][10:]) * 1000 for k in ("python", "service"))
        print(f"python {a:.1f} ms, service {b:.1f} ms: {b - a:.1f} ms more")


def run_soak_test(seconds: float) -> None:
    subject_photos = load_photos()
    with start_server() as (url, pid):
        warmup_latencies = asyncio.run(run_load(url, subject_photos, 8, 10))
        pause = statistics.mean(warmup_latencies) * 0.25  # 8 clients at 80 % of what they can
        asyncio.run(run_load(url, subject_photos, 8, 10, pause))
        before = get_memory_mib(pid)
        latencies = asyncio.run(run_load(url, subject_photos, 8, seconds, pause))
        after = get_memory_mib(pid)
        memory_text = f"memory {before:.0f} to {after:.0f} MiB ({after / before - 1:+.1%})"
        print(f"{len(latencies)} requests in {seconds:.0f} s, no error; {memory_text}")


def get_memory_mib(pid: int) -> float:
    """Resident memory of a process in MiB."""
    line = next(
        x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS")
    )
    return int(line.split()[1]) / 1024


def get_cpu_time_s(pid: int) -> float:
    """Seconds that a process has computed so far, on all processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    tasks = {
        "loras": measure_lora_throughput,
        "pictures": measure_image_batching,
        "overhead": measure_overhead,
        "soak": run_soak_test,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=tasks)
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    tasks[arguments.part](arguments.seconds)


if __name__ == "__main__":
    main()
