"""Requests from a fuzzer that knows the API, and uploads from one that knows images."""

import asyncio
import base64
import io
import json
import socket
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import schemathesis
import torch
import typer
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance

from hyperlora.cli.serve import _run_server
from hyperlora.errors import InvalidLoraFileError
from hyperlora.service.app import create_app
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.engine.lora_files import load_request_file
from hyperlora.service.settings import ServiceSettings, hash_key
from tests.conftest import Bundle
from tests.service.conftest import Models, StartClient, make_photo, post_photos

KEY = "a-long-enough-key"


@pytest.fixture(scope="module")
def api(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.pipelines.image_to_lora import ImageToLora

    base = load_diffusion_base(bundle.base)
    model = ImageToLora.from_pretrained(bundle.model, base=base)
    keys = frozenset({hash_key(KEY)})
    settings = ServiceSettings(
        state_dir=tmp_path_factory.mktemp("state"),
        rate_limit="1000000/minute",
        timeout_s=20.0,
        key_digests=keys,
    )
    app = create_app(lambda on_batch: LocalEngine(model, base, on_batch=on_batch), settings)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        # the first image loads modules, which may take longer than schemathesis waits
        body = {"prompt": "a", "num_inference_steps": 1, "width": 64, "height": 64}
        response = client.post("/v1/images", json=body, headers={"X-API-Key": KEY})
        assert response.status_code == 200
        yield schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.slow
def test_openapi_describes_every_answer(api: Any) -> None:
    """There is no server error, and no answer that OpenAPI does not announce.

    Schemas cannot say that random bytes are no photo.
    """
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) >= 11
    for operation in operations:
        _fuzz(operation)


def _fuzz(operation: Any) -> None:
    @given(case=operation.as_strategy())
    @settings(
        max_examples=15,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    def holds(case: Any) -> None:
        if isinstance(case.body, dict) and "refine_steps" in case.body:
            case.body["refine_steps"] = 0
        if isinstance(case.body, dict) and {"prompt", "num_inference_steps"} & case.body.keys():
            num_steps = case.body.get("num_inference_steps", 2)
            if isinstance(num_steps, int):  # a few small images: larger ones take too long
                case.body |= {"num_inference_steps": min(num_steps, 2), "width": 64, "height": 64}
        case.call_and_validate(
            headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=[positive_data_acceptance]
        )

    holds()


def mutate_photo(random: np.random.Generator) -> bytes:
    """A photo of some format with bytes changed, cut off, repeated or put in front."""
    data = bytearray(
        make_photo(int(random.integers(255)), 24, str(random.choice(["PNG", "JPEG", "WEBP"])))
    )
    match int(random.integers(5)):
        case 0:
            for place in random.integers(0, len(data), 8):
                data[place] = int(random.integers(256))
        case 1:
            del data[int(random.integers(1, len(data))) :]
        case 2:
            place = int(random.integers(len(data)))
            data[place:place] = random.bytes(int(random.integers(1, 200)))
        case 3:
            data[:4] = random.bytes(4)
        case 4:
            data = bytearray(random.bytes(int(random.integers(0, 3000))))
    return bytes(data)


def make_bomb() -> bytes:
    """A PNG of a few bytes that claims 60000x60000 pixels."""
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"

    def chunk(body: bytes) -> bytes:
        return (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    pixels = chunk(b"IDAT" + zlib.compress(bytes(10_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + pixels + chunk(b"IEND")


def test_create_lora_reads_or_refuses_mutated_photos(client: TestClient) -> None:
    random = np.random.default_rng(0)
    answers = [post_photos(client, mutate_photo(random)) for _ in range(200)]
    assert {a.status_code for a in answers} == {200, 415}
    for answer in answers:
        if answer.status_code == 415:
            assert len(answer.json()["detail"].split()) > 5


def test_create_lora_refuses_decompression_bombs(client: TestClient) -> None:
    answer = post_photos(client, make_bomb())
    assert answer.status_code == 415
    assert "60000×60000" in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b\r\n",
        b'--b\r\nContent-Disposition: form-data; name="photos"; filename="a"\r\n\r\nabc',
        b'--b\r\nContent-Disposition: form-data; name="photos"\r\n\r\nabc\r\n--b--\r\n',
        b"--b\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--b--\r\n",
        b"\xff\xfe\x00" * 50,
    ],
)
def test_create_lora_refuses_broken_multipart(client: TestClient, body: bytes) -> None:
    answer = client.post(
        "/v1/loras", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert 400 <= answer.status_code < 500
    assert answer.json()["detail"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}, 200),
        ({"Host": "[::1]", "Origin": "https://[::1]:443"}, 200),
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:9999"}, 403),
        ({"Host": "localhost", "Origin": "http://127.0.0.1"}, 403),
        ({"Host": "localhost:443", "Origin": "http://localhost"}, 403),
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "made-to-point-here.example"}, 403),
        ({"Host": "["}, 403),
        ({"Host": "localhost:a"}, 403),
        ({"Host": "127.0.0.1:70000"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "http://localhost:-1"}, 403),
        ({"Origin": ""}, 403),
    ],
)
def test_auth_refuses_other_sites_without_keys(
    client: TestClient, headers: dict[str, str], status: int
) -> None:
    assert client.get("/v1/models", headers=headers).status_code == status


def test_run_server_limits_the_headers_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    servers: list[uvicorn.Server] = []
    run = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: servers.append(server))
    app = FastAPI()
    app.state.service = SimpleNamespace(shutdown=Mock())
    with pytest.raises(typer.Exit):
        _run_server(app, "127.0.0.1", 0, 1.0)
    (server,) = servers
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=run, args=(server, [listener]), daemon=True)
    thread.start()
    with socket.create_connection(listener.getsockname(), 10) as connection:
        connection.sendall(b"GET /docs HTTP/1.1\r\nHost: localhost\r\n")
        with suppress(ConnectionError):  # the server may close first
            for i in range(40):
                connection.sendall(b"x-%d: %s\r\n" % (i, b"a" * 4096))
                time.sleep(0.005)
        connection.settimeout(1)
        assert connection.recv(12) == b"HTTP/1.1 400"
    server.should_exit = True
    thread.join(10)


def test_auth_reads_no_body_of_an_unknown_sender(
    start_client: StartClient,
) -> None:
    read: list[bool] = []
    app = start_client(key_digests=frozenset({hash_key(KEY)})).app

    async def call(key: str) -> int:
        statuses: list[int] = []

        async def receive() -> dict[str, Any]:
            read.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            statuses.extend([message["status"]] if "status" in message else [])

        headers = [
            (b"authorization", f"Bearer {key}".encode()),
            (b"content-type", b"application/json"),
        ]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/images",
            "headers": headers,
            "query_string": b"",
        }
        await app(
            scope | {"raw_path": b"/v1/images", "root_path": "", "http_version": "1.1"},
            receive,
            send,
        )
        return statuses[0]

    assert asyncio.run(call("wrong")) == 401
    assert not read
    assert asyncio.run(call(KEY)) == 422
    assert read


def test_generate_image_limits_padded_loras(client: TestClient, models: Models) -> None:
    """A few bytes of a huge rank on one target pad every target to that rank."""
    tensors = {}
    for target in models.model.layout.targets:
        rank = 30_000 if not tensors else 1
        stem = f"unet.{target.path}"
        tensors[f"{stem}.lora_A.weight"] = torch.zeros(
            rank, target.in_features, dtype=torch.float16
        )
        tensors[f"{stem}.lora_B.weight"] = torch.zeros(
            target.out_features, rank, dtype=torch.float16
        )
    tensors = {k: v for k, v in tensors.items() if v.ndim == 2}
    content = base64.b64encode(safetensors.torch.save(tensors)).decode()
    request = {"prompt": "a", "loras": [{"content": content}] * 8}
    answer = client.post("/v1/images", json=request)
    assert answer.status_code == 400
    assert "would unfold to" in answer.json()["detail"]


@pytest.mark.parametrize("header", [{"unet.r": 10**400}, {"unet.use_dora": "\ud800"}])
def test_generate_image_refuses_odd_lora_metadata(
    client: TestClient, models: Models, header: dict[str, Any]
) -> None:
    metadata = {"lora_adapter_metadata": json.dumps(header)}
    file = safetensors.torch.save({"unet.x.lora_A.weight": torch.zeros(1, 1)}, metadata)
    answer = client.post(
        "/v1/images", json={"prompt": "a", "loras": [{"content": base64.b64encode(file).decode()}]}
    )
    assert answer.status_code == 400


def test_load_request_file_refuses_huge_headers(models: Models) -> None:
    tensors = {"unet.x.lora_A.weight": torch.zeros(1, 1)}
    file = safetensors.torch.save(tensors, {"ss_tag_frequency": "x" * (3 << 20)})
    with pytest.raises(InvalidLoraFileError, match="header claims"):
        load_request_file(file, models.base)


def test_generate_image_takes_a_window_at_the_edge(client: TestClient, models: Models) -> None:
    lora = base64.b64encode(models.model([make_photo()]).serialize()).decode()
    request = {
        "prompt": "a",
        "num_inference_steps": 2,
        "width": 64,
        "height": 64,
        "strategy": "spatial",
        "windowed": True,
    }
    answer = client.post(
        "/v1/images", json=request | {"loras": [{"content": lora}], "regions": [[0.99, 0, 1, 1]]}
    )
    assert answer.status_code == 200


def test_create_lora_keeps_uploads_off_the_disk(
    start_client: StartClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body is larger than what form parsers spool; temporary files are made to fail."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a temporary file was opened")

    client = start_client()
    monkeypatch.setattr("tempfile.TemporaryFile", forbidden)
    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", forbidden)
    noise = np.random.default_rng(0).integers(0, 255, (1000, 1000, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    assert len(buffer.getvalue()) > 2 << 20
    assert post_photos(client, buffer.getvalue()).status_code == 200
