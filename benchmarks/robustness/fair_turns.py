"""How long Bob waits while Alice's key has 64 long jobs: his picture and job of two steps each.

    python -m benchmarks.robustness.fair_turns [--num-jobs 64] [--refine-steps 500] [--repeats 5]

Prints the median seconds of both alone and beside Alice's jobs. Exits 1 above ``MAX_SLOWDOWN``.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import httpx

from benchmarks.service_process import start_server
from hyperlora.pretrained import BENCHMARK_DIR

ALICE_KEY, BOB_KEY = "alices-key-0123456", "bobs-key-012345678"
MAX_SLOWDOWN: Final = 3.0
_TIMEOUT_S: Final = 120.0


def load_photo() -> bytes:
    """Load the photo of a test subject."""
    return next(BENCHMARK_DIR.rglob("*.webp")).read_bytes()


def submit_job(client: httpx.Client, photo: bytes, refine_steps: int) -> str:
    """Submit the job of a refined LoRA.

    Args:
        client: The client of one key.
        photo: The photo.
        refine_steps: Steps of the refinement.

    Returns:
        Path of the job.
    """
    response = client.post(
        "/v1/loras",
        files={"photos": photo},
        data={"refine_steps": refine_steps},
        headers={"Prefer": "respond-async"},
    )
    response.raise_for_status()
    return response.headers["location"]


def run_job(client: httpx.Client, photo: bytes) -> None:
    """Run a job of two steps to its end."""
    path = submit_job(client, photo, 2)
    with client.stream("GET", path + "/events") as events:
        text = "".join(events.iter_text())
    if "event: succeeded" not in text:
        raise RuntimeError(f"the job did not succeed: {text[-300:]}")


def run_picture(client: httpx.Client) -> None:
    """Generate a picture of two steps."""
    body = {"prompt": "a portrait", "num_inference_steps": 2}
    client.post("/v1/images", json=body).raise_for_status()


def measure_seconds(work: Callable[[], None], repeats: int) -> list[float]:
    """Measure the seconds of some work.

    Args:
        work: The work.
        repeats: Number of runs.

    Returns:
        Seconds of each run.
    """
    seconds = []
    for _ in range(repeats):
        start_time = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start_time)
    return seconds


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-jobs", type=int, default=64)
    parser.add_argument("--refine-steps", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    photo, slowdowns = load_photo(), []
    with tempfile.TemporaryDirectory() as folder:
        key_file = Path(folder) / "keys"
        key_file.write_text(f"{ALICE_KEY}\n{BOB_KEY}\n")
        with (
            start_server("--api-key-file", str(key_file), "--no-ui", "--no-edits") as (url, _),
            _open_client(url, ALICE_KEY) as alice,
            _open_client(url, BOB_KEY) as bob,
        ):
            works = {
                "picture": lambda: run_picture(bob),
                "job": lambda: run_job(bob, photo),
            }
            for work in works.values():
                work()  # loads modules
            alone = {name: measure_seconds(work, arguments.repeats) for name, work in works.items()}
            jobs = [
                submit_job(alice, photo, arguments.refine_steps) for _ in range(arguments.num_jobs)
            ]
            for name, work in works.items():
                seconds = measure_seconds(work, arguments.repeats)
                median, median_alone = statistics.median(seconds), statistics.median(alone[name])
                slowdowns.append(median / median_alone)
                print(
                    f"{name}: {median_alone:.2f} s alone, {median:.2f} s beside {len(jobs)} jobs "
                    f"({slowdowns[-1]:.1f}x), longest {max(seconds):.2f} s"
                )
            for path in jobs:
                alice.delete(path)
    raise SystemExit(1 if max(slowdowns) > MAX_SLOWDOWN else 0)


def _open_client(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=_TIMEOUT_S, headers={"X-API-Key": key})


if __name__ == "__main__":
    main()
