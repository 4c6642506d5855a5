"""The page in a real browser, on the bundled models.

UI_SCREENSHOTS=docs/images pytest tests/service/test_browser.py    # writes the images of the docs
"""

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from hyperlora import load_lora, pretrained
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.service.app import create_app
from hyperlora.service.engine.edits import EditEngine
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.settings import ServiceSettings
from hyperlora.service.ui import add_ui

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TIMEOUT_MS = 300_000  # for a machine that does other things too
SCREENSHOT_DIR = os.environ.get("UI_SCREENSHOTS")
NUM_STEPS = "20" if SCREENSHOT_DIR else "4"
PHOTO = pretrained.BENCHMARK_DIR / "subjects" / "person-1100002" / "0.webp"
EDIT = pretrained.EDIT_BENCHMARK_DIR / "000-glasses"

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    base, edit_base = (
        load_diffusion_base(pretrained.BASE_DIR),
        load_diffusion_base(pretrained.EDIT_BASE_DIR),
    )
    model = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR, base=base)
    edit_engine = EditEngine(
        PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR, base=edit_base), edit_base
    )
    identity_similarity = IdentitySimilarity.from_pretrained(pretrained.EVALUATOR_DIR)
    settings = ServiceSettings(
        state_dir=tmp_path_factory.mktemp("state"), timeout_s=TIMEOUT_MS / 1000
    )
    app = create_app(
        lambda on_batch: LocalEngine(
            model,
            base,
            on_batch=on_batch,
            edit_engine=edit_engine,
            identity_similarity=identity_similarity,
        ),
        settings,
    )
    add_ui(app, settings)
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    running.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def open_window(browser: Any, address: str) -> Iterator[Any]:
    """Open the page in a window; no request may leave this machine, and nothing may fail."""
    urls: list[str] = []
    errors: list[str] = []
    windows: list[Any] = []

    def open_page(width: int, height: int) -> Any:
        windows.append(browser.new_context(viewport={"width": width, "height": height}))
        page = windows[-1].new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("request", lambda request: urls.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda message: errors.append(message.text) if message.type == "error" else None,
        )
        page.goto(address)
        page.wait_for_function("document.querySelector('textarea')?.value.includes('sks person')")
        page.locator("#more-photos button").first.click()
        page.locator("#steps-photos input[type=number]").fill(NUM_STEPS)
        page.locator("#more-photos button").first.click()
        return page

    yield open_page
    for window in windows:
        window.close()
    assert urls and not [url for url in urls if not url.startswith((address, "data:", "blob:"))]
    assert not errors


def create_lora(page: Any, photo: Path) -> None:
    page.set_input_files("#photos input[type=file]", photo)
    page.wait_for_selector("#photos img")
    page.click("#make")
    page.wait_for_function("document.querySelectorAll('#portraits img').length == 8")
    page.wait_for_selector("#status progress", state="detached")


def take_screenshot(page: Any, name: str) -> None:
    """Write an image for the documentation, if asked for."""
    if SCREENSHOT_DIR:
        page.mouse.move(0, 0)
        page.screenshot(path=Path(SCREENSHOT_DIR, f"{name}.png"), full_page=True)


def fits_window(page: Any) -> bool:
    return bool(
        page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
    )


def test_ui_makes_portraits_files_and_compositions(open_window: Any, tmp_path: Path) -> None:
    page = open_window(1280, 900)
    create_lora(page, PHOTO)
    assert page.locator(".notice").count() == 0
    with_lora, without_lora = (
        float(chip.get_attribute("data-similarity")) for chip in page.locator(".chip").all()
    )
    assert with_lora > without_lora + 0.2
    take_screenshot(page, "page")
    assert (
        'pipe.load_lora_weights("me.safetensors")' in page.locator(".cm-content").first.inner_text()
    )
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "kohya.safetensors")
    file = load_lora(tmp_path / "kohya.safetensors")
    assert (file.format, file.metadata.title) == ("kohya", "me")
    assert download.value.suggested_filename == "me.safetensors"
    assert page.locator("#download").inner_text() == "Download for diffusers"

    page.get_by_role("tab", name="Compose").click()
    page.get_by_text("Weight of me").wait_for()
    page.set_input_files("#files input[type=file]", tmp_path / "kohya.safetensors")
    page.get_by_text("Weight of kohya").wait_for()
    page.locator("#more-compose button").first.click()
    page.locator("#steps-compose input[type=number]").fill("4")
    page.click("#generate")
    page.wait_for_function("document.querySelectorAll('#composition img').length == 4")


def test_ui_warns_of_unknown_photos_on_a_phone(open_window: Any, tmp_path: Path) -> None:
    page = open_window(390, 844)
    assert fits_window(page) and page.get_by_role("tab", name="Compose").is_visible()
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "gradient.png")
    create_lora(page, tmp_path / "gradient.png")
    assert "does not look like the avatars this model knows" in page.locator(".notice").inner_text()
    assert page.locator(".chip").count() == 0  # the evaluator does not know such pictures either
    if SCREENSHOT_DIR:
        page = open_window(390, 844)
        create_lora(page, PHOTO)
        take_screenshot(page, "page-phone")
    assert fits_window(page)


def test_ui_shows_refusals_as_one_sentence(open_window: Any, tmp_path: Path) -> None:
    page = open_window(390, 844)
    page.click("#make")
    page.get_by_text("there is no photo yet").first.wait_for()
    (tmp_path / "broken.png").write_bytes(PHOTO.read_bytes()[:200])
    page.set_input_files("#photos input[type=file]", tmp_path / "broken.png")
    page.wait_for_selector("#photos img", state="attached")
    page.click("#make")
    page.get_by_text("is damaged or cut off").first.wait_for()
    page.wait_for_selector("#status progress", state="detached")


def test_ui_edits_other_images_as_a_pair_shows(open_window: Any) -> None:
    page = open_window(390, 844)
    page.get_by_role("tab", name="From a pair").click()
    for side in ("before", "after"):
        page.set_input_files(f"#{side} input[type=file]", EDIT / f"shown-0_{side}.webp")
        page.wait_for_selector(f"#{side} img")
    page.set_input_files("#others input[type=file]", PHOTO)
    page.wait_for_selector("#others img")
    page.click("#make-edit")
    page.wait_for_function("document.querySelectorAll('#edited img').length == 2")
    assert fits_window(page)


def test_ui_links_to_the_api_docs(open_window: Any) -> None:
    page = open_window(1280, 900)
    page.get_by_role("link", name="API").click()
    page.get_by_text("/v1/identity-similarity", exact=True).wait_for()
