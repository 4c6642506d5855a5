"""From a pair: the LoRA of an edit, and the same edit on other pictures."""

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from PIL import Image

from hyperlora.errors import BadImage
from hyperlora.service.ui.api_client import Api, contents, refused
from hyperlora.service.ui.components import code, download, dropped, notice, section, status, thumbnail
from hyperlora.service.ui.sampling import together
from hyperlora.service.ui.text import NO_EDITS, edit_snippet


def pair_tab(api: Api) -> None:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False, elem_classes="sides"):
        with gr.Column(scale=4, min_width=300):
            with gr.Row():
                before, after = (_picture(side) for side in ("Before", "After"))
            others = gr.Gallery(
                label="Make the same change on", sources=["upload", "clipboard"], file_types=["image"], columns=3,
                height=170, object_fit="cover", fit_columns=False, interactive=True, elem_id="others", buttons=[],
            )  # fmt: skip
            strength = gr.Slider(0, 2, 1, step=0.05, label="Strength of the change")
            reverse = gr.Checkbox(label="Undo the change instead")
            go = gr.Button("Make the change", variant="primary", size="lg", elem_id="change")
        with gr.Column(scale=7, min_width=300):
            said = gr.HTML(visible=False)
            edited = gr.HTML(NO_EDITS, elem_id="edited")
            with gr.Column(visible=False) as result:
                with gr.Row():
                    diffusers = gr.DownloadButton("Download for diffusers", size="md")
                    kohya = gr.DownloadButton("Download for ComfyUI, A1111", size="md")
                program = code()

    async def make(
        before: str | None, after: str | None, others: Any, strength: float, reverse: bool, visitor: gr.Request
    ) -> AsyncIterator[dict[Any, Any]]:
        if not before or not after:
            raise refused("a picture before and the same picture after the edit are needed")
        pair = (contents([before])[0], contents([after])[0])
        pair = pair[::-1] if reverse else pair
        pictures = contents(others) or [pair[0]]
        async with api.of(visitor) as server:
            yield {said: gr.HTML(status("Making the LoRA of the change …", 0), visible=True)}
            options = {"title": "change", "strength": strength}
            lora = await server.make_change([pair], **options)
            twin = await server.make_change([pair], **options, format="kohya")
            facts = (await server.models())[-1]
            yield {
                diffusers: download(diffusers, lora, "change"),
                kohya: download(kohya, twin, "change", kohya=True),
                program: gr.Code(edit_snippet(facts["base"], "change.safetensors")),
                result: gr.Column(visible=True),
            }
            doubts = notice(list(dict.fromkeys(server.notices)))
            made: list[Image.Image | None] = [None] * len(pictures)
            async with together(server.edit(picture, lora=lora) for picture in pictures) as tasks:
                for i, task in enumerate(tasks):
                    yield {said: doubts + status("Editing …", i / len(tasks)), edited: _shown(pictures, made)}
                    made[i] = await task
            yield {said: gr.HTML(doubts, visible=bool(doubts)), edited: _shown(pictures, made)}

    inputs: list[Any] = [before, after, others, strength, reverse]
    outputs: list[Any] = [said, edited, diffusers, kohya, program, result]
    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    made = go.click(make, inputs, outputs, **private)
    made.failure(lambda: gr.HTML(visible=False), None, said, **private)


def _picture(side: str) -> gr.Image:
    return dropped(side, ["upload", "webcam", "clipboard"], height=210, min_width=130, elem_id=side.lower())


def _shown(pictures: list[bytes], made: list[Image.Image | None]) -> str:
    try:
        given: list[Image.Image | None] = [thumbnail(picture) for picture in pictures]
    except BadImage as error:
        raise refused(str(error)) from error
    return section("Changed", "", made) + section("As they were", "", given)
