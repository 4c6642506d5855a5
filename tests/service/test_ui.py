"""The page: who may see it, and that it calls the API as its visitor."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import gradio as gr
import pytest
import torch
from fastapi.testclient import TestClient

from hyperlora.encoders.ood_detector import OodDetector, pool_features
from hyperlora.encoders.sidecar import compute_encoder_fingerprint
from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.seeds import MAX_SEED
from hyperlora.service.engine.requests import ModelInfo
from hyperlora.service.settings import hash_key
from hyperlora.service.ui.api_client import Api
from hyperlora.service.ui.components import make_file_name, render_similarity, render_warnings
from hyperlora.service.ui.compose_tab import build_compose_tab
from hyperlora.service.ui.lora_tray import MAX_ITEMS, TrayItem, add_item, make_tray_state
from hyperlora.service.ui.pair_tab import build_pair_tab
from hyperlora.service.ui.photo_tab import build_photo_tab
from hyperlora.service.ui.sessions import COOKIE_NAME, Sessions
from hyperlora.service.ui.text import get_prompt_presets, make_snippet
from tests.service.conftest import Models, StartClient, assert_problem, make_photo
from tests.test_deploy import is_public

KEY = "a-long-enough-key"
UPLOAD = {"files": ("me.png", make_photo(), "image/png")}


def make_visitor(client: TestClient) -> Any:
    """What Gradio hands to a handler."""
    return SimpleNamespace(cookies=dict(client.cookies), client=SimpleNamespace(host="127.0.0.1"))


def find_sessions(client: TestClient) -> Sessions:
    """Find the sessions of the page of an app."""
    app: Any = client.app
    sessions: Sessions = app.router.routes[-1].app.sessions
    return sessions


def test_add_ui_leaves_the_api_as_it_is(start_client: StartClient) -> None:
    client = start_client(with_ui=True)
    page = client.get("/")
    assert page.status_code == 200
    assert "hyperlora" in page.text and "window.gradio_config" in page.text
    assets = re.findall(r'(?:src|href)="\.?(/[^"#?]+)"', page.text)
    assert assets and all(map(is_public, assets)), "the proxy of compose.yaml passes them"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/docs").status_code == client.get("/v1/models").status_code == 200
    assert_problem(client.put("/v1/loras"), 405, "")
    for path in ("/v1/nothing", "/v1", "//etc/passwd"):
        assert_problem(client.get(path), 404, "nothing is found at this path")
    assert client.get(f"/gradio_api/file={Path(__file__)}").status_code == 403


def test_ui_auth_refuses_other_sites(start_client: StartClient) -> None:
    client = start_client(with_ui=True)
    for headers in (
        {"Host": "evil.example"},
        {"Host": "["},
        {"Origin": "https://evil.example"},
        {"Origin": "http://["},
        {"Origin": "http://localhost:9999"},
    ):
        assert_problem(client.get("/", headers=headers), 403, "its own machine only")
        assert_problem(
            client.post("/gradio_api/upload", files=UPLOAD, headers=headers),
            403,
            "its own machine only",
        )


def test_ui_auth_asks_for_a_key(start_client: StartClient) -> None:
    client = start_client(
        with_ui=True, key_digests=frozenset({hash_key(KEY)}), rate_limit="20/minute"
    )
    sign_in_page = client.get("/")
    assert 'type="password"' in sign_in_page.text and "gradio" not in sign_in_page.text
    assert_problem(client.get("/config"), 401, "an API key")
    assert_problem(client.post("/gradio_api/upload", files=UPLOAD), 401, "an API key")
    wrong = client.post("/sign-in", data={"key": "<b>wrong</b>"})
    assert (wrong.status_code, COOKIE_NAME in client.cookies) == (401, False)
    assert "no API key of this server" in wrong.text

    right = client.post("/sign-in", data={"key": KEY}, follow_redirects=False)
    assert (right.status_code, right.headers["location"]) == (303, "/")
    assert {"HttpOnly", "SameSite=strict"} <= set(right.headers["set-cookie"].split("; "))
    assert "window.gradio_config" in client.get("/").text
    assert client.post("/gradio_api/upload", files=UPLOAD).status_code == 200

    guesses = [
        client.post("/sign-in", data={"key": f"guess number {i} of many"}).status_code
        for i in range(30)
    ]
    assert guesses[-1] == 429  # guessing counts


def test_ui_auth_keeps_pages_of_other_ports_out(start_client: StartClient) -> None:
    client = start_client(with_ui=True, key_digests=frozenset({hash_key(KEY)}))
    client.post("/sign-in", data={"key": KEY})
    other_page = {"Origin": "http://localhost:9999"}
    preflight = {"Access-Control-Request-Method": "POST"}
    for answer in (
        client.get("/config", headers=other_page),
        client.options("/gradio_api/upload", headers=other_page | preflight),
    ):
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    for site, status in (("same-site", 403), ("cross-site", 403), ("same-origin", 200)):
        headers = {"Sec-Fetch-Site": site}
        answer = client.post("/gradio_api/upload", files=UPLOAD, headers=headers)
        assert answer.status_code == status


def test_ui_auth_ignores_odd_cookies(start_client: StartClient) -> None:
    client = start_client(with_ui=True, key_digests=frozenset({hash_key(KEY)}))
    client.post("/sign-in", data={"key": KEY})
    own_cookie = f"{COOKIE_NAME}={client.cookies[COOKIE_NAME]}"
    for odd_cookie in ("a@b=1", "a/b=2", "[=3", "no value", '"'):
        answer = client.get("/config", headers={"Cookie": f"{odd_cookie}; {own_cookie}"})
        assert answer.status_code == 200


def test_ui_auth_closes_web_sockets(start_client: StartClient) -> None:
    app: Any = start_client(with_ui=True).app
    receive, send = AsyncMock(return_value={"type": "websocket.connect"}), AsyncMock()
    for path in ("/", "/gradio_api/queue/join"):
        scope = {"type": "websocket", "path": path, "headers": [], "query_string": b""}
        asyncio.run(app(scope | {"raw_path": path.encode(), "root_path": ""}, receive, send))
        assert send.call_args.args[0]["type"] == "websocket.close"
        send.reset_mock()


def test_open_client_sends_the_visitors_key(start_client: StartClient) -> None:
    client = start_client(with_ui=True, key_digests=frozenset({hash_key(KEY)}))
    api = Api(client.app, find_sessions(client))  # type: ignore[arg-type]

    async def create_lora() -> bytes:
        async with api.open_client(make_visitor(client)) as server:
            return await server.create_lora([make_photo()])

    with pytest.raises(gr.Error, match="An API key of this server is needed"):
        asyncio.run(create_lora())
    client.post("/sign-in", data={"key": KEY})
    assert load_lora(asyncio.run(create_lora())).weights.compute_delta_norms().max() > 0


def test_open_client_passes_warnings_and_refusals_on(
    start_client: StartClient, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start_client(with_ui=True)
    api = Api(client.app)  # type: ignore[arg-type]
    monkeypatch.setattr(models.model, "ood_detector", make_empty_detector(models.model))

    async def list_warnings(data: bytes) -> list[str]:
        async with api.open_client(make_visitor(client)) as server:
            await server.create_lora([data])
            return server.warnings

    (warning,) = asyncio.run(list_warnings(make_photo()))
    assert warning.startswith("this photo does not look like the gradients this model knows")
    assert render_warnings([warning]).count("This photo does not look like") == 1
    with pytest.raises(gr.Error, match="a PNG, JPEG or WEBP image was expected"):
        asyncio.run(list_warnings(b"no image"))


def make_empty_detector(model: ImageToLora) -> OodDetector:
    """Make a detector that knows no photo."""
    photos = torch.rand(40, 1, 3, 16, 16)
    features = pool_features(model.encode_photos(photos).image)[:, 0]
    fingerprint = compute_encoder_fingerprint(model.encoder)
    detector = OodDetector.fit(features, features, "gradients", fingerprint)
    return replace(detector, threshold=-1.0)


def make_model_info(trigger_phrase: str, domain: str) -> ModelInfo:
    return ModelInfo(
        id="image-to-lora",
        kind="image-to-lora",
        base="x/y",
        rank=4,
        num_targets=1,
        fingerprint="",
        trigger_phrase=trigger_phrase,
        license="",
        resolution=64,
        lora_format="kohya",
        domain=domain,
    )


def test_components_escape_and_format() -> None:
    assert "0.74" in render_similarity([0.7, 0.78]) and "clearly alike" in render_similarity([0.74])
    assert "−0.04" in render_similarity([-0.04], with_label=False)
    assert render_warnings([]) == "" and "<b>" not in render_warnings(["<b>"])
    assert make_file_name("../Zoë Ä/1 ") == "Zoë-Ä-1" and make_file_name("//") == "lora"
    for trigger_phrase, domain in (("sks person", "avatars"), ("", "")):
        presets = get_prompt_presets(make_model_info(trigger_phrase, domain))
        assert all(prompt.startswith("a portrait of ") for prompt in presets.values())
    compile(make_snippet("avatars/base", "me.safetensors", 'say "cheese"'), "snippet", "exec")


def test_add_item_keeps_the_last_under_unique_names() -> None:
    items: list[TrayItem] = []
    for i in range(MAX_ITEMS + 2):
        items = add_item(items, "me", f"/{i}/me.safetensors")
    assert [item.path[1] for item in items] == list("234567")
    assert len({item.name for item in items}) == MAX_ITEMS
    assert add_item(items, "again", items[0].path)[-1].name == "again"


def get_handler(build_tab: Callable[[gr.Blocks, gr.State], None], name: str) -> Any:
    """Lay out a tab, with a tray; return the event handler of a name."""
    with gr.Blocks() as blocks:
        build_tab(blocks, make_tray_state(60))
    return next(function.fn for function in blocks.fns.values() if function.name == name)


def write_photo(path: Path, shade: int = 100) -> str:
    path.write_bytes(make_photo(shade))
    return str(path)


async def collect(updates: AsyncIterator[Any]) -> list[Any]:
    return [update async for update in updates]


def list_downloads(updates: list[dict[Any, Any]]) -> list[Path]:
    """List the files behind the download buttons, in their order."""
    values = [value for update in updates for value in update.values()]
    return [Path(v.value["path"]) for v in values if isinstance(v, gr.DownloadButton) and v.value]


def test_pair_tab_makes_files_and_edits_images(start_client: StartClient, tmp_path: Path) -> None:
    client = start_client(with_ui=True)
    create_lora = get_handler(lambda *_: build_pair_tab(Api(client.app)), "create_lora")  # type: ignore[arg-type]
    before, after = write_photo(tmp_path / "a.png"), write_photo(tmp_path / "b.png", 0)
    visitor = make_visitor(client)
    updates = asyncio.run(collect(create_lora(before, after, None, 1.0, False, visitor)))
    files = list_downloads(updates)
    assert [path.name for path in files] == ["edit.safetensors"]
    loras = [load_lora(path) for path in files]
    assert [(lora.format, lora.metadata.title) for lora in loras] == [("kohya", "edit")]
    (edited_html,) = [v for v in updates[-1].values() if isinstance(v, str)]
    assert edited_html.count("<img") == 2  # the edited image and the original

    reverse_updates = asyncio.run(collect(create_lora(before, after, None, 1.0, True, visitor)))
    reverse_lora = load_lora(list_downloads(reverse_updates)[0])
    torch.testing.assert_close(
        reverse_lora.weights.flatten(), (-loras[0].weights).flatten(), atol=1e-5, rtol=1e-3
    )
    with pytest.raises(gr.Error, match="the same image after the edit are needed"):
        asyncio.run(collect(create_lora(before, None, None, 1.0, False, visitor)))


def test_photo_and_compose_tabs_generate_images(start_client: StartClient, tmp_path: Path) -> None:
    client = start_client(with_ui=True)
    api, visitor = Api(client.app), make_visitor(client)  # type: ignore[arg-type]
    photo = write_photo(tmp_path / "me.png")
    create_lora = get_handler(partial(build_photo_tab, api), "create_lora")
    updates = asyncio.run(
        collect(create_lora([photo], "a b", 1.0, "me", 4, "0", "LCM", [], None, visitor))
    )
    assert [p.name for p in list_downloads(updates)] == ["me.safetensors"]
    (tray,) = [v for update in updates for k, v in update.items() if isinstance(k, gr.State)]
    assert [item.name for item in tray] == ["me"]
    status_html, portraits_html = updates[-1].values()
    assert "The LoRA took" in status_html and portraits_html.count("<img") == 8

    generate_grid = get_handler(partial(build_compose_tab, api), "generate_grid")
    pages = asyncio.run(
        collect(generate_grid(visitor, tray, "merge", "a b", 4, " 5", "", 0.5, 1.0))
    )
    assert "<h3>me</h3>" in pages[-1] and pages[-1].count("<img") == 4
    with pytest.raises(gr.Error, match="There is no LoRA yet"):
        asyncio.run(collect(generate_grid(visitor, [], "merge", "a b", 4, "0", "")))

    def list_images(seed: str) -> list[str]:
        pages = asyncio.run(collect(generate_grid(visitor, tray, "merge", "a b", 2, seed, "", 1.0)))
        return re.findall(r'<img[^>]*src="([^"]+)"', pages[-1])

    last_images, first_images = list_images(str(MAX_SEED)), list_images("")
    assert len(set(last_images)) == 4
    assert last_images[1:] == first_images[:3]  # 0 follows the largest seed
    for seed in ("-1", str(MAX_SEED + 1), "1.5", "x", "1e3", "9" * 5000):
        with pytest.raises(gr.Error, match=f"whole number from 0 to {MAX_SEED} expected, got"):
            list_images(seed)


def test_serve_reports_a_missing_gradio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from hyperlora.cli.serve import _add_ui

    monkeypatch.setitem(sys.modules, "hyperlora.service.ui", None)
    _add_ui(None, None)
    assert "add the extra `ui`" in capsys.readouterr().err
