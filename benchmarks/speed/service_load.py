"""The service under load, with the bundled avatar models: real HTTP, one server process.

    python -m benchmarks.speed.service_load loras|images|overhead|soak [--duration-s 20]

loras     POST /v1/loras with 32 clients against 1: ratio of photos/s, p50 and p99
images    images of 8 subjects in one batch against one after another: ratio, largest difference
overhead  POST /v1/loras of one client against the call in Python
soak      about 80 % of the load that 8 clients reach: errors, memory at the start and at the end
"""

import argparse
import asyncio
import statistics
import time

import numpy as np

from benchmarks.service_process import get_cpu_time_s, get_memory_mib, start_server
from hyperlora import pretrained
from hyperlora.client import AsyncClient, Client


def load_photos() -> list[bytes]:
    """Load the first photo of every bundled test subject, encoded."""
    folders = sorted((pretrained.BENCHMARK_DIR / "subjects").iterdir())
    return [min(folder.iterdir()).read_bytes() for folder in folders]


async def run_load(
    url: str, photos: list[bytes], num_clients: int, duration_s: float, pause_s: float = 0.0
) -> list[float]:
    """Send requests for LoRAs from several clients, each one request after another.

    Args:
        url: URL of the server.
        photos: Encoded photos, used in turn.
        num_clients: Number of clients.
        duration_s: Time after which no request starts.
        pause_s: Pause of a client between requests.

    Returns:
        Latency of each request in seconds.
    """
    latencies: list[float] = []
    # a client takes tens of milliseconds to make, so all are made before the clock starts
    clients = [AsyncClient(url) for _ in range(num_clients)]
    end_time = time.perf_counter() + duration_s

    async def run_client(number: int, client: AsyncClient) -> None:
        async with client:
            for i in range(10**9):
                if (start_time := time.perf_counter()) > end_time:
                    return
                await client.create_lora([photos[(number + i) % len(photos)]])
                latencies.append(time.perf_counter() - start_time)
                await asyncio.sleep(pause_s)

    await asyncio.gather(*(run_client(i, client) for i, client in enumerate(clients)))
    return latencies


def measure_lora_throughput(duration_s: float) -> None:
    """Print throughput, latency and processor time of requests for LoRAs with 1 and 32 clients."""
    photos = load_photos()
    with start_server() as (url, pid):
        asyncio.run(run_load(url, photos, 4, 2))  # warm up
        loras_per_s, cpu_ms = {}, {}
        for num_clients in (1, 32, 1, 32):  # twice, to show a drift
            cpu_start_s = get_cpu_time_s(pid)
            latencies = asyncio.run(run_load(url, photos, num_clients, duration_s / 4))
            # each client always has one request under way
            loras_per_s[num_clients] = num_clients / statistics.mean(latencies)
            cpu_time_s = get_cpu_time_s(pid) - cpu_start_s
            cpu_ms[num_clients] = cpu_time_s / len(latencies) * 1000
            p50, p99 = np.percentile(latencies, [50, 99]) * 1000
            print(
                f"{num_clients} clients: {loras_per_s[num_clients]:.1f} LoRAs/s, "
                f"p50 {p50:.0f} ms, p99 {p99:.0f} ms ({p99 / p50:.1f}x), "
                f"{cpu_ms[num_clients]:.1f} ms of processor time each"
            )
        print(
            f"32 against 1: {loras_per_s[32] / loras_per_s[1]:.2f}x "
            f"({cpu_ms[1] / cpu_ms[32]:.2f}x by processor time)"
        )


def measure_image_batching(duration_s: float) -> None:
    """Print the speed-up of concurrent image requests, and the largest difference of pixels.

    ``duration_s`` is unused: three rounds are measured.
    """
    photos = load_photos()[:8]
    with start_server() as (url, pid), Client(url) as client:
        loras = [client.create_lora([photo]) for photo in photos]
        prompt = "a portrait of sks person, smiling"

        def generate_sequentially() -> list[np.ndarray]:
            return [
                np.asarray(client.generate_image(prompt, [lora], seed=i))
                for i, lora in enumerate(loras)
            ]

        async def request_concurrently() -> list[np.ndarray]:
            async with AsyncClient(url) as async_client:
                requests = [
                    async_client.generate_image(prompt, [lora], seed=i)
                    for i, lora in enumerate(loras)
                ]
                return [np.asarray(image) for image in await asyncio.gather(*requests)]

        def generate_concurrently() -> list[np.ndarray]:
            return asyncio.run(request_concurrently())

        methods = {"sequential": generate_sequentially, "concurrent": generate_concurrently}
        wall_times_s: dict[str, list[float]] = {name: [] for name in methods}
        cpu_times_s: dict[str, list[float]] = {name: [] for name in methods}
        images = {}
        generate_sequentially()  # warm up
        for _ in range(3):
            for name, generate in methods.items():
                start_time, cpu_start_s = time.perf_counter(), get_cpu_time_s(pid)
                images[name] = generate()
                wall_times_s[name].append(time.perf_counter() - start_time)
                cpu_times_s[name].append(get_cpu_time_s(pid) - cpu_start_s)
        pairs = zip(images["sequential"], images["concurrent"], strict=True)
        max_difference = max(np.abs(a.astype(int) - b.astype(int)).max() for a, b in pairs)
        for times, unit in ((wall_times_s, "s"), (cpu_times_s, "s of processor time")):
            sequential, concurrent = (statistics.median(times[name]) for name in methods)
            print(
                f"8 images: sequential {sequential:.2f} {unit}, concurrent {concurrent:.2f}: "
                f"{sequential / concurrent:.2f}x"
            )
        print(f"differ by {max_difference}/255")


def measure_overhead(duration_s: float) -> None:
    """Print the time of a request above that of the call in Python.

    ``duration_s`` is unused: 60 requests are measured, the first ten left out.
    """
    from hyperlora.pipelines.image_to_lora import ImageToLora

    photos = load_photos()
    model = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR)

    def generate_lora(photo: bytes) -> bytes:
        return model(photo).serialize()

    with start_server() as (url, _), Client(url) as client:

        def request_lora(photo: bytes) -> bytes:
            return client.create_lora([photo])

        methods = {"python": generate_lora, "service": request_lora}
        times_s: dict[str, list[float]] = {name: [] for name in methods}
        for i in range(60):
            for name, generate in methods.items():
                start_time = time.perf_counter()
                generate(photos[i % len(photos)])
                times_s[name].append(time.perf_counter() - start_time)
        python_ms, service_ms = (statistics.median(times_s[name][10:]) * 1000 for name in methods)
        overhead_ms = service_ms - python_ms
        print(f"python {python_ms:.1f} ms, service {service_ms:.1f} ms: {overhead_ms:.1f} ms more")


def run_soak_test(duration_s: float) -> None:
    """Print the requests and the growth of memory at 80 % of the load of 8 clients."""
    photos = load_photos()
    with start_server() as (url, pid):
        warmup_latencies = asyncio.run(run_load(url, photos, 8, 10))
        pause_s = statistics.mean(warmup_latencies) * 0.25  # 80 % of the load without pauses
        asyncio.run(run_load(url, photos, 8, 10, pause_s))
        before_mib = get_memory_mib(pid)
        latencies = asyncio.run(run_load(url, photos, 8, duration_s, pause_s))
        after_mib = get_memory_mib(pid)
        growth = after_mib / before_mib - 1
        print(
            f"{len(latencies)} requests in {duration_s:.0f} s, no error; "
            f"memory {before_mib:.0f} to {after_mib:.0f} MiB ({growth:+.1%})"
        )


def main() -> None:
    """Parse the command line and print the figures."""
    tasks = {
        "loras": measure_lora_throughput,
        "images": measure_image_batching,
        "overhead": measure_overhead,
        "soak": run_soak_test,
    }
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("part", choices=tasks)
    parser.add_argument("--duration-s", type=float, default=20.0)
    arguments = parser.parse_args()
    tasks[arguments.part](arguments.duration_s)


if __name__ == "__main__":
    main()
