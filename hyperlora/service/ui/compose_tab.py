"""Compose: several LoRAs in one picture, each with its weight."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from hyperlora.service.ui.api_client import Api, make_ui_error, read_uploads
from hyperlora.service.ui.components import render_section, render_status
from hyperlora.service.ui.lora_tray import MAX_ITEMS, TrayItem, add_item
from hyperlora.service.ui.sampling import (
    build_prompt_box,
    build_sampling_options,
    compute_progress,
    sample_grid,
)
from hyperlora.service.ui.text import EMPTY_COMPOSITION, EMPTY_TRAY, STRATEGIES


def build_compose_tab(api: Api, blocks: gr.Blocks, tray: gr.State) -> None:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False, elem_classes="sides"):
        with gr.Column(scale=4, min_width=300):
            files = gr.File(
                label="Add LoRA files",
                file_count="multiple",
                file_types=[".safetensors"],
                height=160,
                elem_id="files",
            )
            empty_message = gr.HTML(EMPTY_TRAY)
            weights = [gr.Slider(-1, 2, 1, step=0.05, visible=False) for _ in range(MAX_ITEMS)]
            strategy = gr.Radio(STRATEGIES, value="merge", label="How they work together")
            prompt = build_prompt_box(api, blocks)
            with gr.Accordion("More", open=False, elem_id="more-compose"):
                steps, seed = build_sampling_options("compose")
            with gr.Row():
                clear_button = gr.Button("Clear", min_width=100)
                generate_button = gr.Button(
                    "Draw", variant="primary", elem_id="draw", min_width=160, scale=2
                )
        with gr.Column(scale=7, min_width=300):
            result_html = gr.HTML(EMPTY_COMPOSITION, elem_id="composed")

    def add_uploads(paths: list[str] | None, items: list[TrayItem]) -> Any:
        for path, data in zip(paths or [], read_uploads(paths), strict=True):
            items = add_item(items, Path(path).stem, data)
        return items, None

    def update_sliders(items: list[TrayItem]) -> Any:
        sliders = [gr.Slider(label=f"Weight of {item.name}", visible=True) for item in items]
        return [
            gr.HTML(visible=not items),
            *sliders,
            *[gr.Slider(visible=False)] * (MAX_ITEMS - len(items)),
        ]

    async def generate_grid(
        visitor: gr.Request,
        items: list[TrayItem],
        strategy: str,
        prompt: str,
        steps: int,
        seed: float | None,
        *lora_weights: float,
    ) -> AsyncIterator[str]:
        if not items:
            raise make_ui_error("there is no LoRA yet: make one from photos, or add a file")
        options = {"strategy": strategy, "weights": lora_weights[: len(items)], "steps": int(steps)}
        title = " + ".join(item.name for item in items)
        async with api.open_client(visitor) as client:
            async for grid in sample_grid(
                client, prompt, [[item.data for item in items]], seed, **options
            ):
                yield render_status("Drawing …", compute_progress(grid)) + render_section(
                    title, "", grid[0]
                )
            yield render_section(title, "", grid[0])

    event_options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    files.upload(add_uploads, [files, tray], [tray, files], **event_options)
    tray.change(update_sliders, tray, [empty_message, *weights], **event_options)
    clear_button.click(lambda: ([], EMPTY_COMPOSITION), None, [tray, result_html], **event_options)
    generate_button.click(
        generate_grid, [tray, strategy, prompt, steps, seed, *weights], result_html, **event_options
    )
