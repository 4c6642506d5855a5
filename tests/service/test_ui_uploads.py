"""Files of visitors: how much they may send, what is looked at, and when it is gone."""

import asyncio
import os
import re
import time
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from fastapi.testclient import TestClient
from gradio import processing_utils
from starlette.exceptions import HTTPException

from hyperlora.service.settings import hash_key
from hyperlora.service.ui.api_client import Api
from hyperlora.service.ui.components import render_section
from hyperlora.service.ui.compose_tab import build_compose_tab
from hyperlora.service.ui.lora_tray import MAX_ITEMS, TrayItem
from hyperlora.service.ui.upload_folder import UploadFolder
from tests.service.conftest import Models, StartClient, assert_problem, make_photo
from tests.service.test_ui import get_handler

KEY = "a-long-enough-key"
UPLOAD = {"files": ("me.png", make_photo(), "image/png")}


def list_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def find_uploads(client: TestClient) -> UploadFolder:
    """Find the folder of uploads of an app."""
    app: Any = client.app
    uploads: UploadFolder = app.router.routes[-1].app.uploads
    return uploads


def test_uploads_outlive_no_server(
    start_client: StartClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "elsewhere"))
    folder = tmp_path / "state" / "ui"
    (folder / "digest").mkdir(parents=True)
    for name in ("digest/me.png", "tmp12345"):  # of a killed server, just now
        (folder / name).touch()
    client = start_client(with_ui=True)
    assert list_files(folder) == []
    (path,) = client.post("/gradio_api/upload", files=UPLOAD).json()
    assert list_files(folder) == [Path(path)]
    (folder / "tmp67890").touch()
    client.__exit__(None, None, None)
    assert list(folder.iterdir()) == []
    client.__enter__()


def test_upload_folder_deletes_what_is_out_of_date(
    start_client: StartClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UploadFolder.__init__, "__defaults__", (3600, 0.05, 1 << 30, 4 << 30))
    folder = tmp_path / "state" / "ui"
    start_client(with_ui=True)
    for name, age_s in (("new/a.png", 3500), ("old/b.png", 3700), ("tmpabc", 3700)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age_s,) * 2)
    deadline = time.monotonic() + 10
    while len(list_files(folder)) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list_files(folder) == [folder / "new" / "a.png"]


def test_equal_files_of_visitors_have_folders_of_their_own(
    start_client: StartClient, tmp_path: Path
) -> None:
    """Folders named by content would tell whether another visitor has the same file."""
    client = start_client(with_ui=True)
    uploads = [Path(client.post("/gradio_api/upload", files=UPLOAD).json()[0]) for _ in range(2)]
    cache = str(tmp_path / "state" / "ui")
    paths = [processing_utils.save_bytes_to_cache(b"a", "a.safetensors", cache) for _ in range(2)]
    paths += [processing_utils.save_file_to_cache(Path(__file__), cache) for _ in range(2)]
    folders = {path.parent for path in [*uploads, *map(Path, paths)]}
    assert len(folders) == 6
    for path in [*uploads, *paths]:
        assert client.get(f"/gradio_api/file={path}").status_code == 200


def test_uploads_count_as_requests(start_client: StartClient) -> None:
    client = start_client(
        with_ui=True, key_digests=frozenset({hash_key(KEY)}), rate_limit="4/minute"
    )
    assert client.post("/sign-in", data={"key": KEY}, follow_redirects=False).status_code == 303
    headers = {"Authorization": f"Bearer {KEY}"}
    assert client.get("/v1/models", headers=headers).status_code == 200
    statuses = [client.post("/gradio_api/upload", files=UPLOAD).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    assert client.get("/v1/models", headers=headers).status_code == 429


@pytest.mark.parametrize(
    ("limit", "status", "sentence"),
    [("max_bytes_per_visitor", 429, "you sent more"), ("max_bytes", 507, "visitors sent more")],
)
def test_upload_folder_limits_bytes(
    start_client: StartClient, limit: str, status: int, sentence: str
) -> None:
    client = start_client(with_ui=True)
    uploads = find_uploads(client)
    setattr(uploads, limit, 3_000)
    file = {"files": ("a.bin", bytes(2_000))}
    assert client.post("/gradio_api/upload", files=file).status_code == 200
    assert_problem(client.post("/gradio_api/upload", files=file), status, sentence)
    uploads.retention_s = 0
    assert client.post("/gradio_api/upload", files=file).status_code == 200


def test_upload_folder_counts_each_visitor(tmp_path: Path) -> None:
    uploads = UploadFolder(tmp_path / "ui", max_bytes_per_visitor=10, max_bytes=25)
    uploads._count("a", 10)
    uploads._count("b", 10)
    with pytest.raises(HTTPException, match="429"):
        uploads._count("a", 1)
    with pytest.raises(HTTPException, match="507"):
        uploads._count("c", 9)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9/a", "HTTPS://example.org/a", "ftp://a/b", " http:/a", "file:/a"]
)
def test_page_fetches_no_addresses(start_client: StartClient, address: str) -> None:
    client = start_client(with_ui=True)
    for prefix in ("/gradio_api/file=", "/gradio_api/proxy="):
        assert_problem(client.get(f"{prefix}{address}"), 403, "fetches no addresses")
    (path,) = client.post("/gradio_api/upload", files=UPLOAD).json()
    assert client.get(f"/gradio_api/file={path}").content == UPLOAD["files"][1]


def test_gradio_fetches_no_addresses(start_client: StartClient, tmp_path: Path) -> None:
    start_client(with_ui=True)
    address = "https://example.org/a"
    for fetch in (
        processing_utils.async_ssrf_protected_get(address),
        processing_utils.async_ssrf_protected_download(address, str(tmp_path)),
        gr.File().async_move_resource_to_block_cache(address),
    ):
        with pytest.raises(ValueError, match="fetches no addresses"):
            asyncio.run(fetch)


def add_files(client: TestClient, *paths: Path, max_bytes: int = 1 << 20) -> list[TrayItem]:
    api = Api(client.app)  # type: ignore[arg-type]
    add_uploads = get_handler(
        lambda blocks, tray: build_compose_tab(api, blocks, tray, max_bytes), "add_uploads"
    )
    items: list[TrayItem] = add_uploads([str(path) for path in paths], [])[0]
    return items


def test_compose_tab_keeps_paths_of_loras(
    start_client: StartClient, models: Models, tmp_path: Path
) -> None:
    data = models.model([make_photo()]).serialize()
    paths = [tmp_path / f"{i}.safetensors" for i in range(MAX_ITEMS + 1)]
    for path in paths:
        path.write_bytes(data)
    items = add_files(start_client(), *paths)
    assert [item.path for item in items] == list(map(str, paths[:MAX_ITEMS]))
    assert len(repr(items)) < len(data) / 2


def test_compose_tab_refuses_other_files(
    start_client: StartClient, models: Models, tmp_path: Path
) -> None:
    client = start_client()
    lora = models.model([make_photo()]).serialize()
    for data, max_bytes, sentence in (
        (b"\x7f" * 5_000, 1 << 20, "not a safetensors file"),
        (b"", 1 << 20, "a.safetensors"),
        (lora, len(lora) - 1, "MiB are taken"),
    ):
        path = tmp_path / "a.safetensors"
        path.write_bytes(data)
        with pytest.raises(gr.Error, match=sentence) as caught:
            add_files(client, path, max_bytes=max_bytes)
        assert str(tmp_path) not in str(caught.value)
        assert not path.exists()


def test_render_section_leaves_uploads_to_the_browser(tmp_path: Path) -> None:
    path = tmp_path / 'a"b c.png'  # which is not even there
    html = render_section("Originals", "", [path])
    assert re.findall('src="([^"]+)"', html) == [
        f"gradio_api/file={tmp_path}/a%22b%20c.png".replace("\\", "/")
    ]
