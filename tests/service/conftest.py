"""The real app over the real engine on the tiny bundle."""

import io
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.lora_diffusion import LoraDiffusion
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.service.app import create_app
from hyperlora.service.engine.edits import EditEngine
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.settings import ServiceSettings


@pytest.fixture(scope="session")
def models(bundle: Any) -> tuple[Any, Any]:
    base = load_diffusion_base(bundle.base)
    return ImageToLora.from_pretrained(bundle.model, base=base), base


@pytest.fixture(scope="session")
def changes(bundle: Any) -> EditEngine:
    base = load_diffusion_base(bundle.edit_base)
    return EditEngine(PairToLora.from_pretrained(bundle.pair_model, base=base), base)


@pytest.fixture(scope="session")
def likeness(bundle: Any) -> IdentitySimilarity:
    return IdentitySimilarity.from_pretrained(bundle.evaluator)


@pytest.fixture(scope="session")
def sampler(difflora: Path) -> LoraDiffusion:
    return LoraDiffusion.from_pretrained(difflora)


@pytest.fixture
def serving(
    models: tuple[Any, Any],
    changes: EditEngine,
    likeness: IdentitySimilarity,
    sampler: LoraDiffusion,
    tmp_path: Path,
) -> Iterator[Callable[..., TestClient]]:
    """Starts a server with these settings, and the page if wanted; all are stopped at the end."""
    running: list[TestClient] = []

    def start(page: bool = False, **settings: Any) -> TestClient:
        given = ServiceSettings(**{"state": tmp_path / "state", "rate": "100000/minute"} | settings)

        def engine(observe: Any) -> LocalEngine:
            return LocalEngine(
                *models,
                given.lora_dir,
                max_queue_size=given.max_queue_size,
                max_lora_batch=given.max_lora_batch,
                on_batch=observe,
                edit_engine=changes,
                identity_similarity=likeness,
                extra_models=[sampler],
            )

        app = create_app(engine, given)
        if page:
            from hyperlora.service.ui import add_ui

            add_ui(app, given)
        client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
        client.__enter__()
        running.append(client)
        return client

    yield start
    for client in running:
        client.__exit__(None, None, None)


@pytest.fixture
def client(serving: Callable[..., TestClient]) -> TestClient:
    return serving()


def photo(shade: int = 100, size: int = 20, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((size, size)).convert("RGB").point(
        lambda v: (v + shade) % 256
    ).save(buffer, format)
    return buffer.getvalue()


def send(
    client: TestClient, *photos: bytes, headers: dict[str, str] | None = None, **fields: Any
) -> Any:
    files = [
        ("photos", (f"{i}.png", data, "image/png")) for i, data in enumerate(photos or (photo(),))
    ]
    return client.post(
        "/v1/loras", files=files, data={k: str(v) for k, v in fields.items()}, headers=headers or {}
    )


@contextmanager
def process(
    bundle: Any, state: Path, *options: str, seconds: float = 600
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server process as users start it, on the tiny bundle and a free port: its address, once it is ready. What it
    logs is in ``state``/log."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    models = [
        "--model",
        str(bundle.model),
        "--base",
        str(bundle.base),
        "--no-edits",
        "--state",
        str(state),
    ]
    code = "from hyperlora.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "serve",
        "--port",
        str(port),
        "--rate",
        "100000/minute",
        *models,
        *options,
    ]
    state.mkdir(exist_ok=True)
    with (
        (state / "log").open("a") as log,
        subprocess.Popen(command, stderr=log, stdout=log) as running,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, running, state / "log", time.monotonic() + seconds)
            yield url, running
        finally:
            running.terminate()
            running.wait(120)


def _wait(url: str, running: "subprocess.Popen[bytes]", log: Path, until: float) -> None:
    with httpx.Client(base_url=url) as client:
        while time.monotonic() < until and running.poll() is None:
            with suppress(httpx.TransportError):
                if client.get("/readyz").status_code == 200:
                    return
            time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")
