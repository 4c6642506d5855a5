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
from hyperlora.client import ServerRefused
from hyperlora.diffusion.diffusion_base import load_base
from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.service.app import create_app
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.settings import ServiceSettings, digest

KEY = "a-long-enough-key"


@pytest.fixture(scope="module")
def server(bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    base = load_base(bundle.base)
    model = ImageToLora.from_pretrained(bundle.model, base=base)
    settings = ServiceSettings(state=tmp_path_factory.mktemp("state"), keys=frozenset({digest(KEY)}))
    app = create_app(lambda observe: LocalEngine(model, base, observe=observe), settings)
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
        lora = client.make_lora([tmp_path / "me.png"], rank=1)
        model = ImageToLora.from_pretrained(bundle.model, base=load_base(bundle.base))
        expected = model([image]).resize(1)
        delta = torch.cat([d.flatten() for d in load_lora(lora, model.layout).weights.delta()])
        torch.testing.assert_close(delta, torch.cat([d.flatten() for d in expected.delta()]))
        options = {"steps": 2, "width": 64, "height": 64, "seed": 3}
        drawn = client.draw("a b", [lora], weights=[3.0], **options)
        assert drawn.size == (64, 64)
        assert drawn.tobytes() != client.draw("a b", **options).tobytes()
        assert client.models()[0]["base"] == model.layout.base

    async def same() -> None:
        async with AsyncClient(server, KEY) as client:
            again, picture = await asyncio.gather(client.make_lora([image], rank=1), client.draw("a b", **options))
            assert load_lora(again).weights.layout == load_lora(lora).weights.layout
            assert picture.size == (64, 64)

    asyncio.run(same())


def test_a_refusal_is_the_servers_sentence(server: str) -> None:
    with Client(server, KEY) as client, pytest.raises(ServerRefused, match="a PNG, JPEG or WEBP image") as refused:
        client.make_lora([b"none"])
    assert refused.value.status == 415
    with Client(server) as client, pytest.raises(ServerRefused, match="an API key"):
        client.models()
