"""The page beside the API: who may see it, and that it asks the API as its visitor."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from fastapi.testclient import TestClient

from hyperlora.encoders.ood_detector import OodDetector, pool_features
from hyperlora.encoders.sidecar import compute_encoder_fingerprint
from hyperlora.lora.io.load import load_lora
from hyperlora.service.settings import hash_key as key_digest
from hyperlora.service.ui.api_client import Api
from hyperlora.service.ui.auth import COOKIE_NAME, decode_key_cookie
from hyperlora.service.ui.components import make_file_name, render_similarity, render_warnings
from hyperlora.service.ui.lora_tray import MAX_ITEMS, add_item
from hyperlora.service.ui.text import get_prompt_presets, make_snippet
from tests.service.conftest import photo
from tests.service.test_routes import refusal

KEY = "a-long-enough-key"
UPLOAD = {"files": ("me.png", photo(), "image/png")}


def visitor(client: TestClient) -> Any:
    """What Gradio hands to a handler."""
    return SimpleNamespace(cookies=dict(client.cookies), client=SimpleNamespace(host="127.0.0.1"))


def test_the_page_stands_beside_the_api(serving: Callable[..., TestClient]) -> None:
    client = serving(page=True)
    page = client.get("/")
    assert page.status_code == 200
    assert "hyperlora" in page.text and "window.gradio_config" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/docs").status_code == client.get("/v1/models").status_code == 200
    refusal(client.put("/v1/loras"), 405, "")
    for path in ("/v1/nothing", "/v1", "//etc/passwd"):
        refusal(client.get(path), 404, "nothing is found at this path")
    assert client.get(f"/gradio_api/file={Path(__file__)}").status_code == 403


def test_what_visitors_drop_is_theirs_alone_and_not_for_ever(
    serving: Callable[..., TestClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    left = tmp_path / "state" / "page" / "old" / "me.png"
    left.parent.mkdir(parents=True)
    left.touch()
    os.utime(left, (0, 0))
    client = serving(page=True)
    (path,) = client.post("/gradio_api/upload", files=UPLOAD).json()
    assert Path(path).is_relative_to(tmp_path / "state" / "page") and not left.exists()


def test_other_sites_are_kept_out(serving: Callable[..., TestClient]) -> None:
    client = serving(page=True)
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        refusal(client.get("/", headers=headers), 403, "its own machine only")
        refusal(
            client.post("/gradio_api/upload", files=UPLOAD, headers=headers),
            403,
            "its own machine only",
        )


def test_with_keys_the_page_asks_for_one(serving: Callable[..., TestClient]) -> None:
    client = serving(page=True, keys=frozenset({key_digest(KEY)}), rate="20/minute")
    asked = client.get("/")
    assert 'type="password"' in asked.text and "gradio" not in asked.text
    refusal(client.get("/config"), 401, "an API key")
    refusal(client.post("/gradio_api/upload", files=UPLOAD), 401, "an API key")
    wrong = client.post("/sign-in", data={"key": "<b>wrong</b>"})
    assert (wrong.status_code, COOKIE_NAME in client.cookies) == (401, False)
    assert "no API key of this server" in wrong.text

    right = client.post("/sign-in", data={"key": KEY}, follow_redirects=False)
    assert (right.status_code, right.headers["location"]) == (303, "/")
    assert {"HttpOnly", "SameSite=strict"} <= set(right.headers["set-cookie"].split("; "))
    assert "window.gradio_config" in client.get("/").text
    assert client.post("/gradio_api/upload", files=UPLOAD).status_code == 200
    assert (
        decode_key_cookie(dict(client.cookies)) == KEY
        and decode_key_cookie({COOKIE_NAME: "é"}) is None
    )

    guesses = [
        client.post("/sign-in", data={"key": f"guess number {i} of many"}).status_code
        for i in range(30)
    ]
    assert guesses[-1] == 429  # guessing counts


def test_the_page_asks_as_its_visitor(serving: Callable[..., TestClient]) -> None:
    client = serving(page=True, keys=frozenset({key_digest(KEY)}))
    api = Api(client.app)  # type: ignore[arg-type]

    async def make() -> bytes:
        async with api.open_client(visitor(client)) as server:
            return await server.create_lora([photo()])

    with pytest.raises(gr.Error, match="An API key of this server is needed"):
        asyncio.run(make())
    client.post("/sign-in", data={"key": KEY})
    assert load_lora(asyncio.run(make())).weights.compute_delta_norms().max() > 0


def test_refusals_and_notices_are_the_apis_own(
    serving: Callable[..., TestClient], models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serving(page=True)
    api = Api(client.app)  # type: ignore[arg-type]
    monkeypatch.setattr(models[0], "domain", nowhere(models[0]))

    async def make(data: bytes) -> list[str]:
        async with api.open_client(visitor(client)) as server:
            await server.create_lora([data])
            return server.warnings

    (said,) = asyncio.run(make(photo()))
    assert said.startswith("this photo does not look like the gradients this model knows")
    assert render_warnings([said]).count("This photo does not look like") == 1
    with pytest.raises(gr.Error, match="a PNG, JPEG or WEBP image was expected"):
        asyncio.run(make(b"no picture"))


def nowhere(model: Any) -> OodDetector:
    """A domain in which nothing lies."""
    import torch

    seen = pool_features(model.features(torch.rand(40, 1, 3, 16, 16)))[:, 0]
    return replace(
        OodDetector.fit(seen, seen, "gradients", compute_encoder_fingerprint(model.encoder)),
        farthest=-1.0,
    )


def test_what_the_page_shows() -> None:
    assert "0.74" in render_similarity([0.7, 0.78]) and "clearly alike" in render_similarity([0.74])
    assert "−0.04" in render_similarity([-0.04], with_label=False)
    assert render_warnings([]) == "" and "<b>" not in render_warnings(["<b>"])
    assert make_file_name("../Zoë Ä/1 ") == "Zoë-Ä-1" and make_file_name("//") == "lora"
    for facts in (
        {"trigger_phrase": "sks person", "base": "avatars/base"},
        {"trigger_phrase": "", "base": "x/y"},
    ):
        assert all(
            prompt.startswith("a portrait of ") for prompt in get_prompt_presets(facts).values()
        )
    compile(make_snippet("avatars/base", "me.safetensors", 'say "cheese"'), "snippet", "exec")


def test_the_shelf_keeps_the_last_under_names_of_their_own() -> None:
    shelf: list[Any] = []
    for i in range(MAX_ITEMS + 2):
        shelf = add_item(shelf, "me", bytes([i]))
    assert [kept.data[0] for kept in shelf] == list(range(2, MAX_ITEMS + 2))
    assert len({kept.name for kept in shelf}) == MAX_ITEMS
    assert add_item(shelf, "again", shelf[0].data)[-1].name == "again"


def test_serve_without_gradio_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from hyperlora.cli.serve import _add_ui

    monkeypatch.setitem(sys.modules, "hyperlora.service.ui", None)
    _add_ui(None, None)
    assert "add the extra `ui`" in capsys.readouterr().err
