"""The page at ``/``: Gradio on the same server, a client of the API like any other.

visitor ── UiAuthMiddleware (key, or this machine only) ──▶ Gradio ── Api ──▶ /v1 of the same app
"""

import os
import secrets
from pathlib import Path
from typing import Any, Final, NoReturn

import gradio as gr
from fastapi import FastAPI
from gradio import processing_utils, route_utils
from starlette.routing import Match, Mount
from starlette.types import Scope

from hyperlora.service.errors import install_handlers
from hyperlora.service.settings import ServiceSettings
from hyperlora.service.ui.api_client import Api
from hyperlora.service.ui.auth import UiAuthMiddleware
from hyperlora.service.ui.compose_tab import build_compose_tab
from hyperlora.service.ui.lora_tray import make_tray_state
from hyperlora.service.ui.pair_tab import build_pair_tab
from hyperlora.service.ui.photo_tab import build_photo_tab
from hyperlora.service.ui.sessions import Sessions
from hyperlora.service.ui.text import HEADER
from hyperlora.service.ui.upload_folder import RETENTION_S, SWEEP_INTERVAL_S, UploadFolder

__all__ = ["add_ui"]
_FONT: Final = (
    "ui-sans-serif",
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "sans-serif",
)
_MONO: Final = ("ui-monospace", "SF Mono", "Consolas", "Liberation Mono", "monospace")
_UPLOAD_TEXTS: Final = {
    "drop_gallery": "Drop photos here",
    "drop_image": "Drop an image",
    "drop_file": "Drop files here",
    "click_to_upload": "choose from this device",
}


def add_ui(app: FastAPI, settings: ServiceSettings) -> None:
    """Mount the page on an app, whose API stays as it is; nothing of it asks another server.

    Args:
        app: The app that ``create_app`` made.
        settings: What the operator decides.
    """
    sessions, uploads = Sessions(), UploadFolder(settings.state_dir / "ui")
    os.environ["GRADIO_TEMP_DIR"] = str(uploads.folder)
    processing_utils.async_ssrf_protected_get = _refuse_url
    processing_utils.hash_file = processing_utils.hash_bytes = _draw_folder_name
    route_utils.GradioUploadFile = _Upload  # type: ignore[misc]
    gr.mount_gradio_app(
        app,
        _build_blocks(Api(app, sessions), settings.max_lora_bytes),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size=settings.max_form_bytes,
        theme=_make_theme(),
        i18n=gr.I18n(en={f"upload_text.{key}": text for key, text in _UPLOAD_TEXTS.items()}),
        css_paths=Path(__file__).with_name("style.css"),
    )
    mount = app.router.routes.pop()
    assert isinstance(mount, Mount)
    assert isinstance(mount.app, FastAPI)
    install_handlers(mount.app)
    uploads.add_to_lifespan(app)
    page = UiAuthMiddleware(mount.app, app.state.auth, sessions, uploads, settings.public_https)
    app.router.routes.append(_NonApiMount("/", page))


async def _refuse_url(url: str) -> NoReturn:
    """Take the place of Gradio's download of an address that a visitor names."""
    raise ValueError("this server fetches no addresses")


def _draw_folder_name(*_: Any, **__: Any) -> str:
    """Take the place of Gradio's names by content, which lead to the same file of others."""
    return secrets.token_hex(32)


class _Upload(route_utils.GradioUploadFile):
    """An upload whose folder has a random name, so that nobody else finds or replaces it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sha.update(secrets.token_bytes(32))


class _NonApiMount(Mount):
    """Every path but the API's, which answers unknown paths itself."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match every path outside /v1/."""
        return (Match.NONE, {}) if scope["path"].startswith("/v1/") else super().matches(scope)


def _build_blocks(api: Api, max_lora_bytes: int) -> gr.Blocks:
    with gr.Blocks(
        title="hyperlora",
        analytics_enabled=False,
        delete_cache=(SWEEP_INTERVAL_S, RETENTION_S),
    ) as blocks:
        gr.HTML(HEADER)
        tray = make_tray_state(RETENTION_S)
        with gr.Tabs():
            with gr.Tab("From photos", id="photos"):
                build_photo_tab(api, blocks, tray)
            with gr.Tab("From a pair", id="pair"):
                build_pair_tab(api)
            with gr.Tab("Compose", id="compose"):
                build_compose_tab(api, blocks, tray, max_lora_bytes)
    blocks.queue(default_concurrency_limit=8, max_size=64, api_open=False)
    return blocks


def _make_theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=_FONT,
        font_mono=_MONO,
        radius_size="lg",
        text_size="md",
    ).set(
        body_background_fill="*neutral_50",
        block_border_width="1px",
        block_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
    )
