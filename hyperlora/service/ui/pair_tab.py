"""From a pair: the LoRA of an edit, and the same edit on other images."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gradio as gr
from gradio.blocks import Block
from PIL import Image

from hyperlora.service.ui.api_client import (
    Api,
    RecordingClient,
    Upload,
    list_paths,
    make_ui_error,
    read_uploads,
)
from hyperlora.service.ui.components import (
    EVENT_OPTIONS,
    Updates,
    make_code_block,
    make_image_input,
    render_section,
    render_status,
    render_warnings,
    save_lora,
    update_download,
)
from hyperlora.service.ui.sampling import run_tasks
from hyperlora.service.ui.text import EMPTY_EDITS, make_edit_snippet

_TITLE: Final = "edit"
"""Title of the LoRA, and name of its file."""


@dataclass(frozen=True)
class _PairTab:
    """Handler of the button, and the components that it updates."""

    api: Api
    status_html: gr.HTML
    edited_html: gr.HTML
    download: gr.DownloadButton
    code_block: gr.Code
    result: gr.Column

    async def create_lora(
        self,
        before: str | None,
        after: str | None,
        other_images: list[Upload] | None,
        strength: float,
        reverse: bool,
        visitor: gr.Request,
    ) -> AsyncIterator[Updates]:
        """Make the LoRA of the edit and its files, and edit the other images."""
        if not before or not after:
            raise make_ui_error("an image before and the same image after the edit are needed")
        pair = (read_uploads([before])[0], read_uploads([after])[0])
        pair = pair[::-1] if reverse else pair
        image_paths = list_paths(other_images) or [Path(after if reverse else before)]
        async with self.api.open_client(visitor) as client:
            first_status = render_status("Making the LoRA of the edit …", 0)
            yield {self.status_html: gr.HTML(first_status, visible=True)}
            lora = await client.create_edit_lora([pair], title=_TITLE, strength=strength)
            model_info = await client.load_model_info("pair-to-lora")
            snippet = make_edit_snippet(model_info.base, f"{_TITLE}.safetensors")
            yield {
                self.download: update_download(
                    self.download,
                    save_lora(self.download, lora, _TITLE),
                    model_info.lora_readers,
                ),
                self.code_block: gr.Code(snippet),
                self.result: gr.Column(visible=True),
            }
            async for updates in self._edit_images(client, image_paths, lora):
                yield updates

    async def _edit_images(
        self, client: RecordingClient, image_paths: list[Path], lora: bytes
    ) -> AsyncIterator[Updates]:
        """Edit images, and show each as soon as it is there."""
        warnings_html = render_warnings(client.unique_warnings)
        images = read_uploads(image_paths)
        edited_images: list[Image.Image | None] = [None] * len(images)
        async with run_tasks(client.edit_image(image, lora=lora) for image in images) as tasks:
            for i, task in enumerate(tasks):
                yield {
                    self.status_html: warnings_html + render_status("Editing …", i / len(tasks)),
                    self.edited_html: _render_images(image_paths, edited_images),
                }
                edited_images[i] = await task
        yield {
            self.status_html: gr.HTML(warnings_html, visible=bool(warnings_html)),
            self.edited_html: _render_images(image_paths, edited_images),
        }


def build_pair_tab(api: Api) -> None:
    """Lay out the tab and connect its events to the API."""
    with gr.Row(equal_height=False, elem_classes="sides"):
        with gr.Column(scale=4, min_width=300):
            with gr.Row():
                before, after = (_make_side_input(side) for side in ("Before", "After"))
            other_images = gr.Gallery(
                label="Make the same edit on",
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
            strength = gr.Slider(0, 2, 1, step=0.05, label="Strength of the edit")
            reverse = gr.Checkbox(label="Undo the edit instead")
            create_button = gr.Button(
                "Make the edit", variant="primary", size="lg", elem_id="make-edit"
            )
        with gr.Column(scale=7, min_width=300):
            status_html = gr.HTML(visible=False)
            edited_html = gr.HTML(EMPTY_EDITS, elem_id="edited")
            with gr.Column(visible=False) as result:
                download = gr.DownloadButton("Download", size="md")
                code_block = make_code_block()

    tab = _PairTab(api, status_html, edited_html, download, code_block, result)
    inputs: list[Block] = [before, after, other_images, strength, reverse]
    outputs: list[Block] = [status_html, edited_html, download, code_block, result]
    create_event = create_button.click(tab.create_lora, inputs, outputs, **EVENT_OPTIONS)
    create_event.failure(lambda: gr.HTML(visible=False), None, status_html, **EVENT_OPTIONS)


def _make_side_input(side: str) -> gr.Image:
    return make_image_input(
        side, ["upload", "webcam", "clipboard"], height=210, min_width=130, elem_id=side.lower()
    )


def _render_images(paths: list[Path], edited_images: list[Image.Image | None]) -> str:
    """Render the edited images above the originals."""
    edited_section = render_section("Edited", "", edited_images)
    return edited_section + render_section("As they were", "", paths)
