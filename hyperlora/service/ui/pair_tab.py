"""From a pair: the LoRA of an edit, and the same edit on other pictures."""

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from PIL import Image

from hyperlora.errors import InvalidImageError
from hyperlora.service.ui.api_client import Api, make_ui_error, read_uploads
from hyperlora.service.ui.components import (
    make_code_block,
    make_image_input,
    make_thumbnail,
    render_section,
    render_status,
    render_warnings,
    update_download,
)
from hyperlora.service.ui.sampling import run_tasks
from hyperlora.service.ui.text import EMPTY_EDITS, make_edit_snippet


def build_pair_tab(api: Api) -> None:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False, elem_classes="sides"):
        with gr.Column(scale=4, min_width=300):
            with gr.Row():
                before, after = (_make_side_input(side) for side in ("Before", "After"))
            other_images = gr.Gallery(
                label="Make the same change on",
                sources=["upload", "clipboard"],
                file_types=["image"],
                columns=3,
                height=170,
                object_fit="cover",
                fit_columns=False,
                interactive=True,
                elem_id="others",
                buttons=[],
            )
            strength = gr.Slider(0, 2, 1, step=0.05, label="Strength of the change")
            reverse = gr.Checkbox(label="Undo the change instead")
            create_button = gr.Button(
                "Make the change", variant="primary", size="lg", elem_id="change"
            )
        with gr.Column(scale=7, min_width=300):
            status_html = gr.HTML(visible=False)
            edited_html = gr.HTML(EMPTY_EDITS, elem_id="edited")
            with gr.Column(visible=False) as result:
                with gr.Row():
                    diffusers = gr.DownloadButton("Download for diffusers", size="md")
                    kohya = gr.DownloadButton("Download for ComfyUI, A1111", size="md")
                code_block = make_code_block()

    async def create_lora(
        before: str | None,
        after: str | None,
        other_images: Any,
        strength: float,
        reverse: bool,
        visitor: gr.Request,
    ) -> AsyncIterator[dict[Any, Any]]:
        if not before or not after:
            raise make_ui_error("a picture before and the same picture after the edit are needed")
        pair = (read_uploads([before])[0], read_uploads([after])[0])
        pair = pair[::-1] if reverse else pair
        images = read_uploads(other_images) or [pair[0]]
        async with api.open_client(visitor) as client:
            yield {
                status_html: gr.HTML(
                    render_status("Making the LoRA of the change …", 0), visible=True
                )
            }
            options = {"title": "change", "strength": strength}
            lora = await client.create_edit_lora([pair], **options)
            kohya_lora = await client.create_edit_lora([pair], **options, format="kohya")
            model_info = (await client.list_models())[-1]
            yield {
                diffusers: update_download(diffusers, lora, "change"),
                kohya: update_download(kohya, kohya_lora, "change", kohya=True),
                code_block: gr.Code(make_edit_snippet(model_info["base"], "change.safetensors")),
                result: gr.Column(visible=True),
            }
            warnings_html = render_warnings(list(dict.fromkeys(client.warnings)))
            edited_images: list[Image.Image | None] = [None] * len(images)
            async with run_tasks(client.edit_image(image, lora=lora) for image in images) as tasks:
                for i, task in enumerate(tasks):
                    yield {
                        status_html: warnings_html + render_status("Editing …", i / len(tasks)),
                        edited_html: _render_images(images, edited_images),
                    }
                    edited_images[i] = await task
            yield {
                status_html: gr.HTML(warnings_html, visible=bool(warnings_html)),
                edited_html: _render_images(images, edited_images),
            }

    inputs: list[Any] = [before, after, other_images, strength, reverse]
    outputs: list[Any] = [status_html, edited_html, diffusers, kohya, code_block, result]
    event_options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    create_event = create_button.click(create_lora, inputs, outputs, **event_options)
    create_event.failure(lambda: gr.HTML(visible=False), None, status_html, **event_options)


def _make_side_input(side: str) -> gr.Image:
    return make_image_input(
        side, ["upload", "webcam", "clipboard"], height=210, min_width=130, elem_id=side.lower()
    )


def _render_images(files: list[bytes], edited_images: list[Image.Image | None]) -> str:
    try:
        thumbnails: list[Image.Image | None] = [make_thumbnail(file) for file in files]
    except InvalidImageError as error:
        raise make_ui_error(str(error)) from error
    return render_section("Changed", "", edited_images) + render_section(
        "As they were", "", thumbnails
    )
