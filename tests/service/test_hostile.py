"""Requests from a fuzzer that knows the API, and uploads from one that knows images."""

import asyncio
import base64
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import schemathesis
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance

from hyperlora.lora.io.save import serialize_lora
from hyperlora.service.app import create_app
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.settings import ServiceSettings, hash_key
from tests.service.conftest import photo, send


@pytest.fixture(scope="module")
def api(bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.pipelines.image_to_lora import ImageToLora

    base = load_diffusion_base(bundle.base)
    model = ImageToLora.from_pretrained(bundle.model, base=base)
    keys = frozenset({hash_key(KEY)})
    given = ServiceSettings(
        state_dir=tmp_path_factory.mktemp("state"),
        rate_limit="1000000/minute",
        timeout_s=20.0,
        key_digests=keys,
    )
    app = create_app(lambda observe: LocalEngine(model, base, on_batch=observe), given)
    with TestClient(app, raise_server_exceptions=False):
        yield schemathesis.openapi.from_asgi("/openapi.json", app)


KEY = "a-long-enough-key"


@pytest.mark.slow
def test_the_api_does_what_it_documents(api: Any) -> None:
    """No server error, no answer that OpenAPI does not announce. (That random bytes are no photo, no schema says.)"""
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
        if isinstance(case.body, dict) and "refine" in case.body:
            case.body["refine"] = 0
        if isinstance(case.body, dict) and isinstance(case.body.get("steps"), int):
            case.body |= {"steps": min(case.body["steps"], 2), "width": 64, "height": 64}
        case.call_and_validate(
            headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=[positive_data_acceptance]
        )

    holds()


def mutated(random: np.random.Generator) -> bytes:
    """A photo of some format with bytes changed, cut off, repeated or put in front."""
    data = bytearray(
        photo(int(random.integers(255)), 24, str(random.choice(["PNG", "JPEG", "WEBP"])))
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


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60000x60000 pixels."""
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"

    def chunk(body: bytes) -> bytes:
        return (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    pixels = chunk(b"IDAT" + zlib.compress(bytes(10_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + pixels + chunk(b"IEND")


def test_mutated_photos_are_read_or_refused(client: TestClient) -> None:
    random = np.random.default_rng(0)
    answers = [send(client, mutated(random)) for _ in range(200)]
    assert {a.status_code for a in answers} == {200, 415}
    for answer in answers:
        if answer.status_code == 415:
            assert len(answer.json()["detail"].split()) > 5


def test_bombs_cost_nothing(client: TestClient) -> None:
    answer = send(client, bomb())
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
def test_broken_multipart(client: TestClient, body: bytes) -> None:
    answer = client.post(
        "/v1/loras", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert 400 <= answer.status_code < 500
    assert answer.json()["detail"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:8000"}, 200),
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "made-to-point-here.example"}, 403),
    ],
)
def test_pages_of_other_sites_cannot_use_a_server_without_keys(
    client: TestClient, headers: dict[str, str], status: int
) -> None:
    assert client.get("/v1/models", headers=headers).status_code == status


def test_nothing_of_a_body_is_read_before_its_sender_is_let_in(
    serving: Callable[..., TestClient],
) -> None:
    read: list[bool] = []
    app = serving(keys=frozenset({hash_key(KEY)})).app

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


def test_a_lora_cannot_unfold_to_more_than_was_agreed(client: TestClient, models: Any) -> None:
    """Few bytes at a huge rank on one site make every site as wide."""
    wide = {}
    for site in models[0].layout.sites:
        rank = 30_000 if not wide else 1
        stem = f"unet.{site.path}"
        wide[f"{stem}.lora_A.weight"] = torch.zeros(rank, site.fan_in, dtype=torch.float16)
        wide[f"{stem}.lora_B.weight"] = torch.zeros(site.fan_out, rank, dtype=torch.float16)
    wide = {k: v for k, v in wide.items() if v.ndim == 2}
    content = base64.b64encode(safetensors.torch.save(wide)).decode()
    bloated = {"prompt": "a", "loras": [{"content": content}] * 8}
    answer = client.post("/v1/images", json=bloated)
    assert answer.status_code == 400
    assert "would unfold to" in answer.json()["detail"]


@pytest.mark.parametrize("header", [{"unet.r": 10**400}, {"unet.use_dora": "\ud800"}])
def test_odd_headers_of_loras_are_refused(
    client: TestClient, models: Any, header: dict[str, Any]
) -> None:
    metadata = {"lora_adapter_metadata": json.dumps(header)}
    file = safetensors.torch.save({"unet.x.lora_A.weight": torch.zeros(1, 1)}, metadata)
    answer = client.post(
        "/v1/images", json={"prompt": "a", "loras": [{"content": base64.b64encode(file).decode()}]}
    )
    assert answer.status_code == 400


def test_a_window_at_the_edge(client: TestClient, models: Any) -> None:
    lora = base64.b64encode(serialize_lora(models[0]([photo()]))).decode()
    wanted = {
        "prompt": "a",
        "steps": 2,
        "width": 64,
        "height": 64,
        "strategy": "spatial",
        "window": True,
    }
    answer = client.post(
        "/v1/images", json=wanted | {"loras": [{"content": lora}], "regions": [[0.99, 0, 1, 1]]}
    )
    assert answer.status_code == 200


def test_uploads_never_touch_the_disk(
    serving: Callable[..., TestClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body above the size at which form parsers spool to files; temporary files are made to fail."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a temporary file was opened")

    client = serving()
    monkeypatch.setattr("tempfile.TemporaryFile", forbidden)
    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", forbidden)
    noise = np.random.default_rng(0).integers(0, 255, (1000, 1000, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    assert len(buffer.getvalue()) > 2 << 20
    assert send(client, buffer.getvalue()).status_code == 200
