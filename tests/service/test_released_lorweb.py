"""LoRWeB behind the API: the LoRA of a pair's edit for one image, by its name in /v1/models."""

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from fastapi.testclient import TestClient

from hyperlora.compute import ComputeConfig
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines.released import lorweb
from hyperlora.pipelines.released.cards import find_card
from hyperlora.pipelines.released.lorweb import LorwebModel
from hyperlora.service.app import create_app
from hyperlora.service.engine.factory import ModelPaths, make_engine_factory
from hyperlora.service.settings import ServiceSettings
from hyperlora.service.ui.api_client import RecordingClient
from tests.conftest import Bundle
from tests.pipelines.released.tiny_networks import CLIP_CONFIG, make_photo, save_clip, save_lorweb
from tests.service.conftest import assert_problem

LINEARS = {
    "transformer_blocks.0.attn.to_q": (12, 8),
    "single_transformer_blocks.1.proj_out": (6, 10),
}
COMPUTE = ComputeConfig(device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lorweb-service")
    save_lorweb(LINEARS, folder / "lorweb" / "lorweb_model" / "lorweb_model.safetensors")
    save_clip(folder / "clip")
    for i, name in enumerate(("before", "after", "image")):
        make_photo(i, 48, 40).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def server(
    folder: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    paths = make_paths(folder, bundle)
    settings = ServiceSettings(tmp_path_factory.mktemp("state"), rate_limit="100000/minute")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lorweb, "make_clip_config", lambda: CLIP_CONFIG)
        app = create_app(make_engine_factory(paths, settings, COMPUTE), settings)
        client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
        with client:
            yield client


def make_paths(folder: Path, bundle: Bundle) -> ModelPaths:
    return ModelPaths(
        model=str(bundle.model),
        base=str(bundle.base),
        pair_model=str(bundle.pair_model),
        edit_base=str(bundle.edit_base),
        extra_models=(f"edits={folder / 'lorweb'}",),
        encoders=(f"edits={folder / 'clip'}",),
    )


def post(
    server: TestClient, folder: Path, *names: str, accept: str = "*/*", **fields: str
) -> httpx.Response:
    """Send images, each in the field of its name."""
    files = [(name, (folder / f"{name}.png").read_bytes()) for name in names]
    return server.post("/v1/loras", data=fields, files=files, headers={"Accept": accept})


ALL = ("before", "after", "image")


@pytest.mark.parametrize(("strength", "rank"), [(0.5, None), (-2.0, 1)])
def test_api_makes_the_lora_of_a_pair_for_one_image(
    server: TestClient, folder: Path, strength: float, rank: int | None
) -> None:
    fields = {"model": "edits", "title": "glasses", "strength": str(strength)}
    response = post(server, folder, *ALL, **fields, **({"rank": str(rank)} if rank else {}))
    assert response.status_code == 200, response.text
    assert "NVIDIA License" in response.headers["hyperlora-note"]
    model = LorwebModel(
        find_card("lorweb"),
        folder / "lorweb" / "lorweb_model" / "lorweb_model.safetensors",
        folder / "clip" / "model.safetensors",
        clip_config=CLIP_CONFIG,
    )
    paths = [folder / f"{name}.png" for name in ALL]
    before, after = paths[:2] if strength > 0 else paths[1::-1]
    expected = model(before, after, paths[2], rank=rank).weights * abs(strength)
    file = load_lora(response.content, expected.layout)
    torch.testing.assert_close(
        file.weights.get_delta_weights()[0], expected.get_delta_weights()[0], atol=1e-2, rtol=1e-2
    )
    assert file.metadata.title == "glasses" and len(file.metadata.reference_sha256) == 3
    assert file.metadata.license.startswith("NVIDIA License")


def test_models_list_the_card_and_others_keep_their_requests(
    server: TestClient, folder: Path
) -> None:
    accept = "application/json"
    body = post(server, folder, *ALL, accept=accept, model="edits", store="true").json()
    assert load_lora(base64.b64decode(body["content"])).weights.layout.rank == 6
    assert server.get(f"/v1/loras/{body['sha256']}").status_code == 200
    cards = {info["id"]: info for info in server.get("/v1/models").json()}
    assert list(cards) == ["image-to-lora", "pair-to-lora", "edits"]
    card = cards["edits"]
    assert (card["kind"], card["commercial_use"], card["rank"]) == ("lorweb", "no", 6)
    assert card["base"] == "black-forest-labs/FLUX.1-Kontext-dev" and card["is_loaded"]
    assert "edit" in card["purpose"] and not card["can_generate_images"]
    client = RecordingClient(server.app, None, "127.0.0.1")  # type: ignore[arg-type]
    pair, image = (folder / "before.png", folder / "after.png"), folder / "image.png"
    data = asyncio.run(client.create_edit_lora([pair], image, model="edits", title="LoRA"))
    assert data == base64.b64decode(body["content"])
    plain = post(server, folder, "before", "after")
    named = post(server, folder, "before", "after", model="pair-to-lora")
    assert plain.status_code == 200 and named.content == plain.content


@pytest.mark.parametrize(
    ("names", "fields", "sentence"),
    [
        (("before", "after"), {"model": "edits"}, "got 1 pairs and no image"),
        ((*ALL, "before", "after"), {"model": "edits"}, "got 2 pairs and one image"),
        (ALL, {"model": "nobody"}, "no model 'nobody' for pairs: it has edits"),
        (ALL, {}, "name it in model, or leave them out"),
        (("before", "after"), {"rank": "3"}, "name it in model, or leave them out"),
        (ALL, {"model": "edits", "rank": "7"}, "from 1 to 6"),
        (ALL, {"model": "edits", "refine_steps": "3"}, "leave refine_steps"),
        (ALL[2:], {}, "send photos of one subject, or before and after"),
    ],
)
def test_api_refuses_what_no_such_model_takes(
    server: TestClient, folder: Path, names: tuple[str, ...], fields: dict[str, str], sentence: str
) -> None:
    assert_problem(post(server, folder, *names, **fields), 400, sentence)


def test_photos_are_for_other_models(server: TestClient, folder: Path) -> None:
    files = [("photos", (folder / "image.png").read_bytes())]
    refused = server.post("/v1/loras", data={"model": "edits"}, files=files)
    assert_problem(refused, 400, "no model 'edits': it has image-to-lora")
    both = [*files, ("image", (folder / "image.png").read_bytes())]
    assert_problem(server.post("/v1/loras", files=both), 400, "image belongs to before and after")


def test_server_needs_a_model_from_photos_first(folder: Path, bundle: Bundle) -> None:
    settings = ServiceSettings(folder / "state")
    paths = ModelPaths(model=str(folder / "lorweb"), base=str(bundle.base), enable_edits=False)
    with pytest.raises(InvalidArgumentError, match="the first --model is one from photos"):
        make_engine_factory(paths, settings, COMPUTE)
