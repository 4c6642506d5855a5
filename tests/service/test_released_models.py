"""Networks that others released behind the API, the page and the clients."""

import asyncio
import base64
import hashlib
import io
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("insightface")

from hyperlora.cli import app as cli_app
from hyperlora.compute import ComputeConfig
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.lora import Lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.negative_lora import NEGATIVE_LORA_KEY, NEGATIVE_SHA256_KEY
from hyperlora.lora.io.prompt_prefix import PROMPT_PREFIX_KEY
from hyperlora.pipelines.photo_model import AnyPhotoModel
from hyperlora.pipelines.released import template_sandbox
from hyperlora.pipelines.released.hub_files import open_files
from hyperlora.service.app import create_app
from hyperlora.service.engine.factory import ModelPaths, make_engine_factory
from hyperlora.service.engine.photo_models import (
    PhotoModels,
    PhotoModelSource,
    find_named_value,
    parse_named_value,
)
from hyperlora.service.engine.sheet_models import SheetModelSource
from hyperlora.service.settings import ServiceSettings
from hyperlora.service.ui.api_client import Api
from hyperlora.service.ui.photo_tab import _load_models, _show_model, build_photo_tab
from tests.conftest import Bundle
from tests.pipelines.released.tiny_hyperlora import save_world
from tests.pipelines.released.tiny_template import make_template
from tests.service.conftest import Models, assert_problem, make_photo, post_photos

NAMES = ["image-to-lora", "face", "hyperlora-edit"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("hyperlora"))


@pytest.fixture(scope="module")
def server(
    world: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    """A server of the tiny bundle and both variants of the tiny HyperLoRA."""
    paths = ModelPaths(
        model=str(bundle.model),
        base=str(bundle.base),
        enable_edits=False,
        extra_models=(f"face={world / 'HyperLoRA'}", f"{world / 'HyperLoRA'}:edit"),
        encoders=(f"face={world / 'clip'}", str(world / "clip")),
        face_pack=str(world / "antelopev2"),
        max_loaded_models=1,
    )
    settings = ServiceSettings(tmp_path_factory.mktemp("state"), rate_limit="100000/minute")
    app = create_app(make_engine_factory(paths, settings, ComputeConfig(device="cpu")), settings)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


def list_cards(server: TestClient) -> dict[str, dict[str, Any]]:
    return {info["id"]: info for info in server.get("/v1/models").json()}


def test_models_are_listed_with_their_cards_and_loaded_at_first_use(
    server: TestClient, world: Path
) -> None:
    cards = list_cards(server)
    assert list(cards) == NAMES
    own, face = cards["image-to-lora"], cards["face"]
    assert own["is_loaded"] and own["can_generate_images"] and own["rank"]
    assert face["kind"] == "hyperlora-sdxl" and "identity" in face["purpose"]
    assert (face["commercial_use"], face["prompt_prefix"]) == ("no", "fcsks fxhks fhyks, ")
    assert face["base"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert face["strength"] == 0.8 and face["download_bytes"] > 10**9
    assert "CC BY-NC 4.0" in face["license_notice"] and not face["can_generate_images"]
    photo = (world / "me.png").read_bytes()
    for name in ("face", "hyperlora-edit"):
        assert not list_cards(server)[name]["is_loaded"]
        assert post_photos(server, photo, model=name).status_code == 200
        loaded = [key for key, card in list_cards(server).items() if card["is_loaded"]]
        assert loaded == ["image-to-lora", name], "at most one released network"
        assert list_cards(server)[name]["rank"]


@pytest.mark.parametrize(("name", "suffix"), [("face", ""), ("hyperlora-edit", ":edit")])
def test_api_makes_the_file_of_generate(
    server: TestClient, world: Path, tmp_path: Path, name: str, suffix: str
) -> None:
    output = tmp_path / "me.safetensors"
    arguments = (
        *("generate", world / "me.png", "--model", f"{world / 'HyperLoRA'}{suffix}"),
        *("--face-pack", world / "antelopev2", "--encoder", world / "clip"),
        *("--device", "cpu", "-o", output),
    )
    result = CliRunner().invoke(cli_app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    photo = (world / "me.png").read_bytes()
    response = post_photos(server, photo, model=name, title="me")
    assert response.content == output.read_bytes()
    note = response.headers["hyperlora-note"]
    assert "non-commercial use only" in note and "begin every prompt with" in note
    as_json = post_photos(
        server, photo, model=name, title="me", headers={"Accept": "application/json"}
    ).json()
    assert base64.b64decode(as_json["content"]) == output.read_bytes()
    assert as_json["format"] == "sgm" and len(as_json["notes"]) == 2
    assert as_json["negative_sha256"] is None


def test_api_refuses_what_a_model_cannot_do(server: TestClient, world: Path) -> None:
    photo = (world / "me.png").read_bytes()
    unknown = post_photos(server, photo, model="nobody")
    assert_problem(unknown, 400, "no model 'nobody': it has image-to-lora, face, hyperlora-edit")
    both = post_photos(server, photo, model="face", method="lora-diffusion")
    assert_problem(both, 400, "not both")
    refined = post_photos(server, photo, model="face", refine_steps=2)
    assert_problem(refined, 400, "leave refine_steps out")
    assert_problem(post_photos(server, make_photo(), model="face"), 415, "no face was found")


def test_page_shows_the_cards_and_makes_a_file_without_portraits(
    server: TestClient, world: Path, tmp_path: Path
) -> None:
    api = Api(server.app)  # type: ignore[arg-type]
    visitor: Any = SimpleNamespace(cookies={}, client=SimpleNamespace(host="127.0.0.1"))
    dropdown, _ = asyncio.run(_load_models(api, visitor))
    assert dropdown.visible and [value for _, value in dropdown.choices] == NAMES
    card, prompt = asyncio.run(_show_model(api, "face", visitor))
    for fact in ("CC BY-NC 4.0", "not allowed", "5.2 GB", "its base is not served", "0.8"):
        assert fact in card, fact
    assert prompt.startswith("fcsks fxhks fhyks, a portrait")
    with gr.Blocks() as blocks:
        build_photo_tab(api, blocks, gr.State([]))
    handler: Callable[..., Any] = next(
        function.fn for function in blocks.fns.values() if function.name == "create_lora"
    )  # type: ignore[assignment]

    async def collect() -> list[dict[Any, Any]]:
        photos = [str(world / "me.png")]
        arguments = (photos, "a man", 1.0, "me", 4, "0", "", [], "face", visitor)
        return [updates async for updates in handler(*arguments)]

    values = [value for updates in asyncio.run(collect()) for value in updates.values()]
    download, negative = [value for value in values if isinstance(value, gr.DownloadButton)]
    assert not negative.visible and negative.value is None, "this model has no second file"
    expected = post_photos(server, (world / "me.png").read_bytes(), model="face", title="me")
    assert Path(download.value["path"]).read_bytes() == expected.content
    (snippet,) = [value.value for value in values if isinstance(value, gr.Code)]
    assert "fcsks fxhks fhyks, a man" in snippet and "lora_scale=0.8" in snippet
    status = next(value for value in reversed(values) if isinstance(value, str) and "took" in value)
    assert "draws no portraits" in status and "non-commercial" in status


WAIT = """
import os, time
while not os.path.exists(os.path.join(os.path.dirname(__file__), "go")):
    time.sleep(0.05)
"""
"""What a template does until the test lets it go on."""


def test_template_stores_both_files_and_keeps_no_other_request_waiting(
    bundle: Bundle, world: Path, tmp_path: Path
) -> None:
    folder = make_template(tmp_path / "ZImage-i2L-v2", WAIT)
    digest = hashlib.sha256((folder / "model.py").read_bytes()).hexdigest()
    paths = ModelPaths(
        model=str(bundle.model),
        base=str(bundle.base),
        enable_edits=False,
        extra_models=(str(folder),),
        trusted_code=(f"zimage-i2l-v2={digest}",),
    )
    settings = ServiceSettings(tmp_path / "state", rate_limit="100000/minute", timeout_s=300)
    app = create_app(make_engine_factory(paths, settings, ComputeConfig(device="cpu")), settings)
    photo = (world / "me.png").read_bytes()
    with TestClient(app, base_url="http://localhost") as server, ThreadPoolExecutor() as threads:
        slow_response = threads.submit(
            post_photos, server, photo, model="zimage-i2l-v2", store=True,
            headers={"Accept": "application/json"},
        )  # fmt: skip
        try:
            while not (template_sandbox._running or slow_response.done()):
                time.sleep(0.05)
            quick_response = threads.submit(post_photos, server, photo).result(60)
            assert quick_response.status_code == 200 and not slow_response.done()
        finally:
            (folder / "go").touch()
        body = slow_response.result().json()
        negative = server.get(f"/v1/loras/{body['negative_sha256']}").content
    assert negative == base64.b64decode(body["negative_content"])
    metadata = load_lora(base64.b64decode(body["content"])).metadata
    assert metadata.extra[NEGATIVE_SHA256_KEY] == body["negative_sha256"]


@pytest.fixture
def lora(models: Models) -> Lora:
    return models.model(make_photo()) * 3


def draw(server: TestClient, loras: list[dict[str, Any]], **options: Any) -> tuple[Any, str]:
    body = {"prompt": "a man", "loras": loras, "num_inference_steps": 2, "guidance_scale": 6}
    response = server.post("/v1/images", json=body | options)
    assert response.status_code == 200, response.text
    image = Image.open(io.BytesIO(response.content))
    return np.asarray(image, int), response.headers.get("hyperlora-note", "")


def make_ref(lora: Lora, **extra: str) -> dict[str, Any]:
    data = Lora(lora.weights, LoraMetadata(extra=extra)).serialize()
    return {"content": base64.b64encode(data).decode()}


def test_images_follow_the_header_of_the_only_lora(server: TestClient, lora: Lora) -> None:
    plain = make_ref(lora)
    same, note = draw(server, [plain])
    assert note == ""
    off, note = draw(server, [make_ref(lora, **{NEGATIVE_LORA_KEY: "off"})])
    assert "no LoRA on the negative branch" in note
    np.testing.assert_array_equal(off, draw(server, [plain], negative_lora="off")[0])
    assert np.abs(off - same).max() > 1
    forced, note = draw(
        server, [make_ref(lora, **{NEGATIVE_LORA_KEY: "off"})], negative_lora="same"
    )
    assert np.abs(forced - same).max() <= 1 and note == ""
    alone, note = draw(server, [make_ref(lora, **{NEGATIVE_LORA_KEY: "gray"})])
    assert np.abs(alone - same).max() <= 1 and "is not here" in note

    negative = make_ref(lora * -0.5)
    data = base64.b64decode(negative["content"])
    files = server.app.state.service.files  # type: ignore[attr-defined]
    keys = {
        NEGATIVE_LORA_KEY: "gray",
        NEGATIVE_SHA256_KEY: files.store_bytes(data, "lora", "host testclient"),
    }
    gray, note = draw(server, [make_ref(lora, **keys)])
    assert "has its own LoRA" in note and np.abs(gray - same).max() > 1
    np.testing.assert_array_equal(gray, draw(server, [plain], negative_lora=negative)[0])
    assert_problem(
        server.post("/v1/images", json={"prompt": "a", "negative_lora": "off"}),
        400, "send at least one",
    )  # fmt: skip


def test_images_begin_with_the_prefix_and_take_the_recommended_strength(
    server: TestClient, lora: Lora
) -> None:
    metadata = LoraMetadata(extra={PROMPT_PREFIX_KEY: "fcsks, "}, recommended_strength=0.5)
    content = base64.b64encode(Lora(lora.weights, metadata).serialize()).decode()
    image, _ = draw(server, [{"content": content}])
    expected, _ = draw(server, [make_ref(lora) | {"weight": 0.5}], prompt="fcsks, a man")
    np.testing.assert_array_equal(image, expected)
    assert np.abs(image - draw(server, [make_ref(lora)])[0]).max() > 1


def test_photo_models_keep_their_number_and_names(models: Models) -> None:
    facts: Any = SimpleNamespace()
    loads: list[str] = []

    def load(name: str) -> AnyPhotoModel:
        loads.append(name)
        if name == "broken":
            raise ModelLoadError("broken")
        return models.model

    sources = [PhotoModelSource.from_model(models.model)] + [
        PhotoModelSource(name, "i2l-v1", partial(load, name), facts)
        for name in ("a", "b", "c", "broken")
    ]
    registry = PhotoModels(sources, max_loaded=2)
    assert registry.find() is sources[0] and registry.find(method="i2l-v1").name == "a"
    for name in ("a", "b", "a", "c", "a", "b"):
        registry.load(registry.find(name))
    assert loads == ["a", "b", "c", "b"], "the one that was used last stays"
    with pytest.raises(ModelLoadError):
        registry.load(registry.find("broken"))
    with pytest.raises(InvalidArgumentError, match="two models of this server are called"):
        PhotoModels([sources[0], sources[0].from_model(models.model)])


def test_values_have_names(tmp_path: Path) -> None:
    (tmp_path / "x=y").mkdir()
    assert parse_named_value("face=bytedance-research/HyperLoRA:edit") == (
        "face",
        "bytedance-research/HyperLoRA:edit",
    )
    assert parse_named_value("/models/a=b") == ("", "/models/a=b")
    assert find_named_value(["a=1", "2"], "a") == "1" and find_named_value(["a=1", "2"], "b") == "2"
    assert find_named_value(["a=1"], "b") is None


@pytest.mark.parametrize(
    ("revisions", "expected"),
    [
        ((), [None, None]),
        (("v1",), ["v1", "v1"]),
        (("v1", "b=0123abc"), ["v1", "0123abc"]),
        (("hyperlora=v2",), ["v2", None]),
    ],
)
def test_revisions_are_those_of_their_networks(
    bundle: Bundle,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    revisions: tuple[str, ...],
    expected: list[str | None],
) -> None:
    opened: list[str | None] = []

    def open_folder(name: str, revision: str | None, offline: bool) -> Any:
        opened.append(revision)
        return open_files(name, None, offline)

    monkeypatch.setattr("hyperlora.service.engine.photo_models.open_files", open_folder)
    monkeypatch.setattr(SheetModelSource, "from_release", lambda *_: None)
    folder = str(world / "HyperLoRA")
    paths = ModelPaths(
        model=str(bundle.model),
        base=str(bundle.base),
        enable_edits=False,
        extra_models=(folder, f"b={folder}"),
        revisions=revisions,
    )
    make_engine_factory(paths, ServiceSettings(world))
    assert opened == expected
