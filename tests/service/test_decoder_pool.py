"""Images are decoded in processes that end: at a limit, with their caller, with the server."""

import asyncio
import io
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from benchmarks.robustness.slow_senders import make_slow_photo
from hyperlora.errors import InvalidImageError
from hyperlora.service.engine.batcher import QueueFullError
from hyperlora.service.engine.decoder_pool import DecodeLimits, DecoderPool
from hyperlora.service.engine.decoder_process import (
    MAX_MEMORY_BYTES,
    DecoderEndedError,
    DecoderProcess,
)
from hyperlora.service.engine.worker import ModelWorker
from hyperlora.service.settings import EngineLimits
from tests.service.conftest import StartClient, assert_problem, make_photo, post_photos

PATIENT = DecodeLimits(100.0, 100.0)
Size = tuple[int, int]
SLOW_PHOTO = make_slow_photo()


def get_sizes(images: list[Image.Image]) -> list[Size]:
    return [image.size for image in images]


def wait_until(condition: Callable[[], object], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    """A pool of one process without time limits."""
    pool = DecoderPool(1, PATIENT)
    yield pool
    pool.close()


@pytest.fixture
def process() -> Iterator[DecoderProcess]:
    process = DecoderProcess()
    yield process
    process.close()


def test_decoder_process_imports_no_torch() -> None:
    program = (
        "import sys, hyperlora.service.engine.decoder_process as d; print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


def test_decoder_process_reads_images_and_refusals(process: DecoderProcess) -> None:
    for size, format in ((20, "PNG"), (33, "JPEG"), (1, "WEBP")):
        data = make_photo(7, size, format)
        expected = Image.open(io.BytesIO(data)).convert("RGB")
        process.wait_until_ready()
        assert process.read_image(data).tobytes() == expected.tobytes()
        for broken in (b"", data[:30], b"GIF89a"):
            with pytest.raises(InvalidImageError, match="expected"):
                process.read_image(broken)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_decoder_process_has_limits_and_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERLORA_API_KEYS", "a-long-enough-key")
    process = DecoderProcess()
    process.wait_until_ready()
    process.read_image(make_photo())
    folder = Path(f"/proc/{process.id}")
    assert b"a-long-enough-key" not in (folder / "environ").read_bytes()
    limits = [line.split() for line in (folder / "limits").read_text().splitlines()]
    assert ["Max", "address", "space", str(MAX_MEMORY_BYTES)] in [line[:4] for line in limits]
    assert ["Max", "core", "file", "size", "0"] in [line[:5] for line in limits]
    process.close()


def test_decoder_process_ends_with_the_server(tmp_path: Path) -> None:
    (tmp_path / "slow.jpg").write_bytes(SLOW_PHOTO)
    program = """if True:
        import pathlib, sys, threading, time
        from hyperlora.service.engine.decoder_process import DecoderProcess
        process = DecoderProcess()
        process.wait_until_ready()
        photo = pathlib.Path(sys.argv[1], "slow.jpg").read_bytes()
        threading.Thread(target=process.read_image, args=(photo,), daemon=True).start()
        print(process.id, flush=True)
        time.sleep(60)"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        child = psutil.Process(int(server.stdout.readline()))
        server.send_signal(signal.SIGKILL)
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_decoder_pool_ends_an_image_at_its_limit(pool: DecoderPool) -> None:
    pool.limits = DecodeLimits(0.2, 0.1)
    prepared: list[object] = []
    with pytest.raises(InvalidImageError, match=r"took longer than 0\.2 s to decode"):
        pool.submit([make_photo(), SLOW_PHOTO], prepared.append).result(30)
    assert not prepared
    pool.limits = PATIENT
    assert pool.submit([make_photo(size=21)] * 2, get_sizes).result(30) == [(21, 21)] * 2


def test_decoder_pool_ends_a_slow_image_for_one_that_waits(pool: DecoderPool) -> None:
    pool.limits = DecodeLimits(100.0, 0.2)
    slow = pool.submit([SLOW_PHOTO], get_sizes)
    assert pool.submit([make_photo(size=22)], get_sizes).result(30) == [(22, 22)]
    with pytest.raises(QueueFullError, match="while others waited"):
        slow.result(0)


def test_decoder_pool_is_free_when_a_caller_leaves(pool: DecoderPool) -> None:
    slow, waiting = (pool.submit([SLOW_PHOTO] * 50, get_sizes) for _ in range(2))
    ordinary = pool.submit([make_photo(size=23)], get_sizes)
    slow.cancel()
    waiting.cancel()
    assert ordinary.result(30) == [(23, 23)]


def test_decode_images_leaves_with_its_task() -> None:
    worker = ModelWorker(EngineLimits(max_queue_size=1))
    worker.decoder_pool.close()
    worker.decoder_pool = DecoderPool(1, PATIENT)

    async def leave_and_ask() -> list[Size]:
        task = asyncio.create_task(worker.decode_images([SLOW_PHOTO] * 50, get_sizes))
        await asyncio.sleep(0.1)
        task.cancel()
        return await worker.prepare_each([make_photo(size=24)], lambda image: image.size)

    assert asyncio.run(leave_and_ask()) == [(24, 24)]
    worker.close(1)


def test_decoder_pool_serves_owners_in_turn() -> None:
    pool = DecoderPool(2, PATIENT)
    futures = [pool.submit([SLOW_PHOTO] * 50, get_sizes, "a") for _ in range(2)]
    order: list[str] = []
    for owner in "aab":
        futures.append(pool.submit([make_photo()], lambda images, o=owner: order.append(o), owner))  # type: ignore[misc]
    futures[0].cancel()
    wait_until(lambda: len(order) == 3)
    assert order[0] == "b"
    pool.close()
    with pytest.raises(QueueFullError, match="stopping"):
        futures[1].result(30)
    with pytest.raises(QueueFullError, match="stopping"):
        pool.submit([], get_sizes)


def test_decoder_pool_survives_its_decoder(pool: DecoderPool) -> None:
    future = pool.submit([SLOW_PHOTO] * 50, get_sizes)
    wait_until(lambda: pool._running and pool._running[0].process)
    decoder = pool._running[0].process
    assert decoder is not None
    psutil.Process(decoder.id).kill()
    with pytest.raises(InvalidImageError, match="broke its decoder"):
        future.result(30)
    assert pool.submit([make_photo(size=25)], get_sizes).result(30) == [(25, 25)]
    with pytest.raises(ZeroDivisionError):
        pool.submit([make_photo()], lambda images: 1 // 0).result(30)


def test_decoder_process_that_was_ended_gives_no_answer(process: DecoderProcess) -> None:
    process.wait_until_ready()
    process.kill()
    assert not process.is_usable
    with pytest.raises(DecoderEndedError):
        process.read_image(make_photo())


def test_create_lora_refuses_slow_photos(start_client: StartClient) -> None:
    client = start_client()
    worker = client.app.state.service.engine._worker  # type: ignore[attr-defined]
    worker.decoder_pool.limits = DecodeLimits(0.2, 0.1)
    assert_problem(post_photos(client, SLOW_PHOTO), 415, "took longer than 0.2 s to decode")
    worker.decoder_pool.limits = PATIENT
    assert post_photos(client).status_code == 200
