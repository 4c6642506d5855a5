"""From photos: a LoRA of a person, portraits with and without it, and how alike they are."""

import time
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from hyperlora.service.ui.api_client import Api, RecordingClient, make_ui_error, read_uploads
from hyperlora.service.ui.components import (
    make_code_block,
    make_file_name,
    make_image_input,
    render_section,
    render_similarity,
    render_status,
    render_warnings,
    update_download,
)
from hyperlora.service.ui.lora_tray import TrayItem, add_item
from hyperlora.service.ui.sampling import (
    ImageRow,
    build_prompt_box,
    build_sampling_options,
    compute_progress,
    sample_grid,
)
from hyperlora.service.ui.text import EMPTY_PORTRAITS, get_prompt_presets, make_snippet


def build_photo_tab(api: Api, blocks: gr.Blocks, tray: gr.State) -> None:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False, elem_classes="sides"):
        with gr.Column(scale=4, min_width=300):
            photos = gr.Gallery(
                label="Photos of one person",
                sources=["upload", "clipboard"],
                file_types=["image"],
                columns=3,
                height=210,
                object_fit="cover",
                fit_columns=False,
                interactive=True,
                elem_id="photos",
                buttons=[],
            )
            with gr.Accordion("Use the camera", open=False):
                camera = make_image_input("Camera", ["webcam"], height=280)
            prompt = build_prompt_box(api, blocks)
            strength = gr.Slider(0, 2, 1, step=0.05, label="Strength of the LoRA")
            with gr.Accordion("More", open=False, elem_id="more-photos"):
                name = gr.Textbox("me", label="Name of the file", max_length=60)
                steps, seed = build_sampling_options("photos")
            create_button = gr.Button("Make the LoRA", variant="primary", size="lg", elem_id="make")
        with gr.Column(scale=7, min_width=300):
            status_html = gr.HTML(visible=False, elem_id="said")
            portraits_html = gr.HTML(EMPTY_PORTRAITS, elem_id="portraits")
            with gr.Column(visible=False) as result:
                with gr.Row():
                    diffusers = gr.DownloadButton(
                        "Download for diffusers", size="md", elem_id="download"
                    )
                    kohya = gr.DownloadButton(
                        "Download for ComfyUI, A1111", size="md", elem_id="download-kohya"
                    )
                code_block = make_code_block()

    async def create_lora(
        photos: Any,
        prompt: str,
        strength: float,
        name: str,
        steps: int,
        seed: float | None,
        tray_items: list[TrayItem],
        visitor: gr.Request,
    ) -> AsyncIterator[dict[Any, Any]]:
        files = read_uploads(photos)
        if not files:
            raise make_ui_error("there is no photo yet: drop one, paste one, or use the camera")
        async with api.open_client(visitor) as client:
            yield {status_html: gr.HTML(render_status("Making the LoRA …", 0), visible=True)}
            start_time = time.perf_counter()
            lora = await client.create_lora(files, title=name, strength=strength)
            elapsed_s = time.perf_counter() - start_time
            kohya_lora = await client.create_lora(
                files, title=name, strength=strength, format="kohya"
            )
            (model_info, *_), warnings = (
                await client.list_models(),
                list(dict.fromkeys(client.warnings)),
            )
            prompt = prompt.strip() or next(iter(get_prompt_presets(model_info).values()))
            yield {
                diffusers: update_download(diffusers, lora, name),
                kohya: update_download(kohya, kohya_lora, name, kohya=True),
                code_block: gr.Code(
                    make_snippet(model_info["base"], f"{make_file_name(name)}.safetensors", prompt)
                ),
                result: gr.Column(visible=True),
                tray: add_item(tray_items, name, lora),
            }
            elapsed_text = f"The LoRA took {elapsed_s:.1f} s"
            async for grid in sample_grid(client, prompt, [[lora], []], seed, steps=int(steps)):
                progress_html = render_status(
                    f"{elapsed_text}; drawing portraits …", compute_progress(grid)
                )
                yield {
                    status_html: render_warnings(warnings) + progress_html,
                    portraits_html: _render_portraits(grid),
                }
            similarities = (
                await _compute_similarities(client, files, grid)
                if model_info["likeness"] and not warnings
                else None
            )
            yield {
                status_html: render_warnings(warnings) + render_status(f"{elapsed_text}."),
                portraits_html: _render_portraits(grid, similarities),
            }

    def add_camera_photo(camera_photo: str | None, photos: Any) -> Any:
        return [*(photos or []), (camera_photo, None)] if camera_photo else photos, None

    inputs = [photos, prompt, strength, name, steps, seed, tray]
    outputs: list[Any] = [status_html, portraits_html, diffusers, kohya, code_block, result, tray]
    event_options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    create_event = create_button.click(create_lora, inputs, outputs, **event_options)
    create_event.failure(lambda: gr.HTML(visible=False), None, status_html, **event_options)
    camera.input(add_camera_photo, [camera, photos], [photos, camera], **event_options)


async def _compute_similarities(
    client: RecordingClient, files: list[bytes], grid: list[ImageRow]
) -> list[list[float]]:
    return [
        await client.compute_identity_similarity(files, [p for p in row if p is not None])
        for row in grid
    ]


def _render_portraits(grid: list[ImageRow], similarities: list[list[float]] | None = None) -> str:
    titles = ("With your LoRA", "Same prompt and seeds, without it")
    badges = (
        [render_similarity(similarities[0]), render_similarity(similarities[1], with_label=False)]
        if similarities
        else ["", ""]
    )
    parts = [
        render_section(title, aside, row)
        for title, aside, row in zip(titles, badges, grid, strict=True)
    ]
    scale_note = "Likeness is read by a separate network: 0 is anyone, 1 another real picture of the same person."
    return "".join(parts) + (f'<p class="aside">{scale_note}</p>' if similarities else "")
