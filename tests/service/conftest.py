"""The real app over the real engine on the tiny bundle."""

import io
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.lora_diffusion import LoraDiffusion
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.service.app import create_app
from hyperlora.service.engine.callbacks import BatchCallback
from hyperlora.service.engine.edits import EditEngine
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.settings import ServiceSettings
from tests.conftest import Bundle

StartClient = Callable[..., TestClient]


class Models(NamedTuple):
    """The model from photos of the tiny bundle, and its base."""

    model: ImageToLora
    base: DiffusionBase


@pytest.fixture(scope="session")
def models(bundle: Bundle) -> Models:
    base = load_diffusion_base(bundle.base)
    return Models(ImageToLora.from_pretrained(bundle.model, base=base), base)


@pytest.fixture(scope="session")
def edit_engine(bundle: Bundle) -> EditEngine:
    base = load_diffusion_base(bundle.edit_base)
    return EditEngine(PairToLora.from_pretrained(bundle.pair_model, base=base), base)


@pytest.fixture(scope="session")
def identity_similarity(bundle: Bundle) -> IdentitySimilarity:
    return IdentitySimilarity.from_pretrained(bundle.evaluator)


@pytest.fixture(scope="session")
def lora_diffusion(lora_diffusion_dir: Path) -> LoraDiffusion:
    return LoraDiffusion.from_pretrained(lora_diffusion_dir)


@pytest.fixture
def start_client(
    models: Models,
    edit_engine: EditEngine,
    identity_similarity: IdentitySimilarity,
    lora_diffusion: LoraDiffusion,
    tmp_path: Path,
) -> Iterator[StartClient]:
    """Start servers with the given settings, with the page if wanted; all stop at the end."""
    clients: list[TestClient] = []

    def start(with_ui: bool = False, **options: Any) -> TestClient:
        defaults = {"state_dir": tmp_path / "state", "rate_limit": "100000/minute"}
        settings = ServiceSettings(**defaults | options)

        def make_engine(on_batch: BatchCallback) -> LocalEngine:
            return LocalEngine(
                models.model,
                models.base,
                settings.lora_dir,
                limits=settings.engine_limits,
                on_batch=on_batch,
                edit_engine=edit_engine,
                identity_similarity=identity_similarity,
                extra_models=[lora_diffusion],
            )

        app = create_app(make_engine, settings)
        if with_ui:
            from hyperlora.service.ui import add_ui

            add_ui(app, settings)
        client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(start_client: StartClient) -> TestClient:
    return start_client()


def make_photo(shade: int = 100, size: int = 20, format: str = "PNG") -> bytes:
    """Make an image file with a gradient."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((size, size)).convert("RGB").point(
        lambda v: (v + shade) % 256
    ).save(buffer, format)
    return buffer.getvalue()


def post_photos(
    client: TestClient, *photos: bytes, headers: dict[str, str] | None = None, **fields: object
) -> httpx.Response:
    """Ask for the LoRA of photos (of one photo if none are given)."""
    files = [
        ("photos", (f"{i}.png", data, "image/png"))
        for i, data in enumerate(photos or (make_photo(),))
    ]
    return client.post(
        "/v1/loras", files=files, data={k: str(v) for k, v in fields.items()}, headers=headers or {}
    )


def assert_problem(response: httpx.Response, status: int, sentence: str) -> None:
    """Check that a response is a problem document whose detail holds a sentence."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert sentence in body["detail"], body["detail"]


@contextmanager
def run_server(
    bundle: Bundle, state_dir: Path, *options: str, timeout_s: float = 600
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Run a server process as users start it, on the tiny bundle and a free port.

    Yields its address, once it is ready, and the process. It logs to ``state_dir``/log.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [
        *(sys.executable, "-c", "from hyperlora.cli import main; main()", "serve"),
        *("--port", str(port)),
        *("--rate-limit", "100000/minute"),
        *("--model", str(bundle.model)),
        *("--base", str(bundle.base)),
        "--no-edits",
        *("--state-dir", str(state_dir)),
        *options,
    ]
    state_dir.mkdir(exist_ok=True)
    with (
        (state_dir / "log").open("a") as log,
        subprocess.Popen(command, stderr=log, stdout=log) as server,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, server, state_dir / "log", time.monotonic() + timeout_s)
            yield url, server
        finally:
            server.terminate()
            server.wait(120)


def _wait_until_ready(
    url: str, server: "subprocess.Popen[bytes]", log: Path, deadline: float
) -> None:
    with httpx.Client(base_url=url) as client:
        while time.monotonic() < deadline and server.poll() is None:
            with suppress(httpx.TransportError):
                if client.get("/readyz").status_code == 200:
                    return
            time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")
