"""The clients against a real server on a port."""

import asyncio
import inspect
import io
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from PIL import Image

from hyperlora import AsyncClient, Client
from hyperlora.client import ApiError
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.service.app import create_app
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.settings import ServiceSettings, hash_key

KEY = "a-long-enough-key"


@pytest.fixture(scope="module")
def server(bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    base = load_diffusion_base(bundle.base)
    model = ImageToLora.from_pretrained(bundle.model, base=base)
    settings = ServiceSettings(
        state_dir=tmp_path_factory.mktemp("state"), key_digests=frozenset({hash_key(KEY)})
    )
    app = create_app(lambda observe: LocalEngine(model, base, on_batch=observe), settings)
    listener = socket.create_server(("127.0.0.1", 0))
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=uvicorn_server.run, args=([listener],), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    uvicorn_server.should_exit = True
    thread.join(20)


def test_client_generates_lora_and_image(server: str, bundle: Any, tmp_path: Path) -> None:
    image = Image.linear_gradient("L").resize((20, 20)).convert("RGB")
    image.save(tmp_path / "me.png")
    with Client(server, KEY) as client:
        lora = client.create_lora([tmp_path / "me.png"], rank=1)
        model = ImageToLora.from_pretrained(bundle.model, base=load_diffusion_base(bundle.base))
        expected = model([image]).weights.resize(1)
        delta = torch.cat(
            [d.flatten() for d in load_lora(lora, model.layout).weights.get_delta_weights()]
        )
        torch.testing.assert_close(
            delta, torch.cat([d.flatten() for d in expected.get_delta_weights()])
        )
        options = {"num_inference_steps": 2, "width": 64, "height": 64, "seed": 3}
        generated = client.generate_image("a b", [lora], weights=[3.0], **options)
        assert generated.size == (64, 64)
        assert generated.tobytes() != client.generate_image("a b", **options).tobytes()
        assert client.list_models()[0]["base"] == model.layout.base

    async def use_async_client() -> None:
        async with AsyncClient(server, KEY) as client:
            async_lora, async_image = await asyncio.gather(
                client.create_lora([image], rank=1), client.generate_image("a b", **options)
            )
            assert load_lora(async_lora).weights.layout == load_lora(lora).weights.layout
            assert async_image.size == (64, 64)

    asyncio.run(use_async_client())


def test_api_error_has_the_message_of_the_server(server: str) -> None:
    with (
        Client(server, KEY) as client,
        pytest.raises(ApiError, match="a PNG, JPEG or WEBP image") as error,
    ):
        client.create_lora([b"none"])
    assert error.value.status_code == 415
    with Client(server) as client, pytest.raises(ApiError, match="an API key"):
        client.list_models()


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str, tuple[bytes, ...]]] = {
    "create_lora": (([b"one"],), {"rank": 2}, "POST /v1/loras", (b"one", b'"rank"')),
    "create_lora_files": (([b"one"],), {"model": "x"}, "POST /v1/loras", (b"one", b'"model"')),
    "create_edit_lora": (
        ([(b"one", b"two")],),
        {"strength": 0.5},
        "POST /v1/loras",
        (b'"before"', b"one", b'"after"', b"two", b"0.5"),
    ),
    "edit_image": (
        (b"one", [(b"two", b"three")], b"four"),
        {"seed": 7},
        "POST /v1/edits",
        (b'"image"', b"one", b'"before"', b"two", b'"after"', b"three", b'"lora"', b"four", b"7"),
    ),
    "generate_image": (
        ("a b", [b"one", "id"], [0.5, 2.0]),
        {"seed": 7},
        "POST /v1/images",
        (b'"a b"', b'"b25l"', b"0.5", b'"id"', b"2.0", b'"seed"'),
    ),
    "compute_identity_similarity": (
        ([b"one"], [b"two"]),
        {},
        "POST /v1/identity-similarity",
        (b'"photos"', b"one", b'"images"', b"two"),
    ),
    "list_models": ((), {}, "GET /v1/models", ()),
}
"""Of every method: arguments, options, the endpoint that it calls, and parts of the body."""


def make_response(request: httpx.Request) -> httpx.Response:
    path = request.url.path
    if request.headers["accept"] == "application/json":
        return httpx.Response(200, json={"content": "b25l", "negative_content": "dHdv"})
    if path == "/v1/models":
        return httpx.Response(200, json=[{"id": "x"}])
    if path == "/v1/identity-similarity":
        return httpx.Response(200, json={"similarities": [0.25]})
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    return httpx.Response(200, content=buffer.getvalue())


@pytest.mark.parametrize("name", CALLS)
def test_clients_send_the_same_request_and_read_the_same_result(name: str) -> None:
    args, options, endpoint, parts = CALLS[name]
    requests: list[tuple[str, bytes]] = []

    def handle_request(request: httpx.Request) -> httpx.Response:
        body = re.sub(rb"--[0-9a-f]{32}", b"--", request.read())  # boundaries are random
        requests.append((f"{request.method} {request.url.path}", body))
        return make_response(request)

    async def call_async_client() -> Any:
        async with AsyncClient(transport=httpx.MockTransport(handle_request)) as client:
            return await getattr(client, name)(*args, **options)

    with Client(transport=httpx.MockTransport(handle_request)) as client:
        result = getattr(client, name)(*args, **options)
    assert asyncio.run(call_async_client()) == result
    (sent_endpoint, body), async_request = requests
    assert async_request == (sent_endpoint, body)
    assert sent_endpoint == endpoint and all(part in body for part in parts)


def test_clients_have_the_same_methods() -> None:
    methods, async_methods = (
        {
            name: str(inspect.signature(method))
            for name, method in inspect.getmembers(client_class, inspect.isfunction)
            if not name.startswith("_")
        }
        for client_class in (Client, AsyncClient)
    )
    assert methods == async_methods
    assert methods.keys() == CALLS.keys()
