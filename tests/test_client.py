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
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True
    thread.join(20)


def test_photo_to_picture(server: str, bundle: Any, tmp_path: Path) -> None:
    image = Image.linear_gradient("L").resize((20, 20)).convert("RGB")
    image.save(tmp_path / "me.png")
    with Client(server, KEY) as client:
        lora = client.create_lora([tmp_path / "me.png"], rank=1)
        model = ImageToLora.from_pretrained(bundle.model, base=load_diffusion_base(bundle.base))
        expected = model([image]).resize(1)
        delta = torch.cat(
            [d.flatten() for d in load_lora(lora, model.layout).weights.get_delta_weights()]
        )
        torch.testing.assert_close(
            delta, torch.cat([d.flatten() for d in expected.get_delta_weights()])
        )
        options = {"steps": 2, "width": 64, "height": 64, "seed": 3}
        drawn = client.generate_image("a b", [lora], weights=[3.0], **options)
        assert drawn.size == (64, 64)
        assert drawn.tobytes() != client.generate_image("a b", **options).tobytes()
        assert client.list_models()[0]["base"] == model.layout.base

    async def same() -> None:
        async with AsyncClient(server, KEY) as client:
            again, picture = await asyncio.gather(
                client.create_lora([image], rank=1), client.generate_image("a b", **options)
            )
            assert load_lora(again).weights.layout == load_lora(lora).weights.layout
            assert picture.size == (64, 64)

    asyncio.run(same())


def test_a_refusal_is_the_servers_sentence(server: str) -> None:
    with (
        Client(server, KEY) as client,
        pytest.raises(ApiError, match="a PNG, JPEG or WEBP image") as refused,
    ):
        client.create_lora([b"none"])
    assert refused.value.status_code == 415
    with Client(server) as client, pytest.raises(ApiError, match="an API key"):
        client.list_models()
