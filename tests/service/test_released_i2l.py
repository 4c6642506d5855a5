"""i2L, whose LoRAs are for another base than that of the server, through the API."""

import base64
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from hyperlora.compute import ComputeConfig
from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines.config import GenerationConfig
from hyperlora.pipelines.generate import generate_files
from hyperlora.pipelines.released.registry import open_released_model
from hyperlora.pipelines.released.released_model import ReleasedOptions
from hyperlora.service.app import create_app
from hyperlora.service.engine.factory import ModelPaths, make_engine_factory
from hyperlora.service.settings import ServiceSettings
from tests.conftest import Bundle
from tests.pipelines.released.tiny_i2l import save_i2l_world
from tests.service.conftest import assert_problem

COMPUTE = ComputeConfig(device="cpu", dtype="float32")


def test_api_serves_the_style_of_one_or_several_images(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_i2l_world(tmp_path, monkeypatch)
    paths = ModelPaths(
        model=str(bundle.model),
        base=str(bundle.base),
        enable_edits=False,
        extra_models=(f"style={folder / 'network'}",),
        encoders=(f"style={folder / 'encoders'}",),
    )
    settings = ServiceSettings(tmp_path / "state", rate_limit="100000/minute")
    app = create_app(make_engine_factory(paths, settings, COMPUTE), settings)
    model = open_released_model(
        str(folder / "network"), ReleasedOptions(encoder=str(folder / "encoders")), COMPUTE
    )
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as server:
        card = next(info for info in server.get("/v1/models").json() if info["id"] == "style")
        assert (card["kind"], card["base"]) == ("i2l-v1", "Tongyi-MAI/Z-Image")
        assert card["commercial_use"] == "yes" and "DINOv3 License" in card["license_notice"]
        assert card["rank"] is None and not card["is_loaded"] and not card["can_generate_images"]
        for num_images in (1, 2):
            photos = [folder / f"{i}.png" for i in range(num_images)]
            (tmp_path / "out").mkdir(exist_ok=True)
            output = tmp_path / "out" / "style.safetensors"
            generate_files(model, photos, output, GenerationConfig())
            form = {"model": "style", "title": "style"}
            files = [("photos", path.read_bytes()) for path in photos]
            response = server.post("/v1/loras", data=form, files=files)
            assert response.status_code == 200, response.text
            assert response.content == output.read_bytes()
            assert load_lora(response.content).weights.layout.rank == 4 * num_images
            assert "SigLIP2" in response.headers["hyperlora-note"]
        accept = {"Accept": "application/json"}
        body = server.post("/v1/loras", data=form, files=files, headers=accept).json()
        assert base64.b64decode(body["content"]) == output.read_bytes()
        assert body["negative_sha256"] is None, "its negative branch has no LoRA"
        refused = server.post("/v1/loras", data=form | {"refine_steps": "2"}, files=files)
        assert_problem(refused, 400, "does not hold Tongyi-MAI/Z-Image")
        info = next(info for info in server.get("/v1/models").json() if info["id"] == "style")
        assert info["rank"] == 4 and info["is_loaded"]
