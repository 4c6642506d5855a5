"""The clients against a real server on a port."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
