"""The page in a real browser, on the shipped bundle: what a visitor does, sees and takes home.

PAGE_PICTURES=docs/images pytest tests/service/test_browser.py    # also writes the pictures of the documentation
"""

import os
import re
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
PATIENCE = 300_000  # milliseconds, for a machine that does other things too
PICTURES = os.environ.get("PAGE_PICTURES")
STEPS = "20" if PICTURES else "4"
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
    changes = EditEngine(
        PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR, base=edit_base), edit_base
    )
    likeness = IdentitySimilarity.from_pretrained(pretrained.EVALUATOR_DIR)
    settings = ServiceSettings(
        state_dir=tmp_path_factory.mktemp("state"), timeout_s=PATIENCE / 1000
    )
    app = create_app(
        lambda observe: LocalEngine(
            model, base, on_batch=observe, edit_engine=changes, identity_similarity=likeness
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
def visit(browser: Any, address: str) -> Iterator[Any]:
    """Opens the page in a window of this size; at the end no request has left this machine, and nothing has failed."""
    seen: list[str] = []
    wrong: list[str] = []
    windows: list[Any] = []

    def opened(width: int, height: int) -> Any:
        windows.append(browser.new_context(viewport={"width": width, "height": height}))
        page = windows[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: seen.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.goto(address)
        page.wait_for_function("document.querySelector('textarea')?.value.includes('sks person')")
        page.locator("#more-photos button").first.click()
        page.locator("#steps-photos input[type=number]").fill(STEPS)
        page.locator("#more-photos button").first.click()
        return page

    yield opened
    for window in windows:
        window.close()
    assert seen and not [url for url in seen if not url.startswith((address, "data:", "blob:"))]
    assert not wrong


def make(page: Any, photo: Path) -> None:
    page.set_input_files("#photos input[type=file]", photo)
    page.wait_for_selector("#photos img")
    page.click("#make")
    page.wait_for_function("document.querySelectorAll('#portraits img').length == 8")
    page.wait_for_selector("#said progress", state="detached")


def pictured(page: Any, name: str) -> None:
    """Kept for the documentation, if asked for."""
    if PICTURES:
        page.mouse.move(0, 0)
        page.screenshot(path=Path(PICTURES, f"{name}.png"), full_page=True)


def fits(page: Any) -> bool:
    return bool(
        page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
    )


def test_photos_to_portraits_to_a_file_to_a_composition(visit: Any, tmp_path: Path) -> None:
    page = visit(1280, 900)
    make(page, PHOTO)
    assert page.locator(".notice").count() == 0
    with_it, without = (
        float(chip.get_attribute("data-likeness")) for chip in page.locator(".chip").all()
    )
    assert with_it > without + 0.2
    pictured(page, "page")
    assert (
        'pipe.load_lora_weights("me.safetensors")' in page.locator(".cm-content").first.inner_text()
    )
    for button, format in (("#download", "diffusers"), ("#download-kohya", "kohya")):
        with page.expect_download() as download:
            page.click(button)
        download.value.save_as(tmp_path / f"{format}.safetensors")
        file = load_lora(tmp_path / f"{format}.safetensors")
        assert (file.format, file.metadata.title) == (format, "me")
        assert re.fullmatch(r"me(-kohya)?\.safetensors", download.value.suggested_filename)

    page.get_by_role("tab", name="Compose").click()
    page.get_by_text("Weight of me").wait_for()
    page.set_input_files("#files input[type=file]", tmp_path / "kohya.safetensors")
    page.get_by_text("Weight of kohya").wait_for()
    page.locator("#more-compose button").first.click()
    page.locator("#steps-compose input[type=number]").fill("4")
    page.click("#draw")
    page.wait_for_function("document.querySelectorAll('#composed img').length == 4")


def test_on_a_phone_an_unknown_picture_is_told_and_drawn(visit: Any, tmp_path: Path) -> None:
    page = visit(390, 844)
    assert fits(page) and page.get_by_role("tab", name="Compose").is_visible()
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "gradient.png")
    make(page, tmp_path / "gradient.png")
    assert "does not look like the avatars this model knows" in page.locator(".notice").inner_text()
    assert page.locator(".chip").count() == 0  # the evaluator does not know such pictures either
    if PICTURES:
        page = visit(390, 844)
        make(page, PHOTO)
        pictured(page, "page-phone")
    assert fits(page)


def test_a_refusal_is_one_sentence(visit: Any, tmp_path: Path) -> None:
    page = visit(390, 844)
    page.click("#make")
    page.get_by_text("there is no photo yet").first.wait_for()
    (tmp_path / "broken.png").write_bytes(PHOTO.read_bytes()[:200])
    page.set_input_files("#photos input[type=file]", tmp_path / "broken.png")
    page.wait_for_selector("#photos img", state="attached")
    page.click("#make")
    page.get_by_text("is damaged or cut off").first.wait_for()
    page.wait_for_selector("#said progress", state="detached")


def test_a_pair_to_the_same_change_elsewhere(visit: Any) -> None:
    page = visit(390, 844)
    page.get_by_role("tab", name="From a pair").click()
    for side in ("before", "after"):
        page.set_input_files(f"#{side} input[type=file]", EDIT / f"shown-0_{side}.webp")
        page.wait_for_selector(f"#{side} img")
    page.set_input_files("#others input[type=file]", PHOTO)
    page.wait_for_selector("#others img")
    page.click("#change")
    page.wait_for_function("document.querySelectorAll('#edited img').length == 2")
    assert fits(page)


def test_the_api_describes_itself(visit: Any) -> None:
    page = visit(1280, 900)
    page.get_by_role("link", name="API").click()
    page.get_by_text("/v1/likeness", exact=True).wait_for()
