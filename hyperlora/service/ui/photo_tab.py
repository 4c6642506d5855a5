"""From photos: a LoRA of a person, portraits with and without it, and how alike they are."""

import time
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from hyperlora.service.ui.api_client import Api, Asked, contents, refused
from hyperlora.service.ui.components import code, download, dropped, file_name, likeness, notice, section, status
from hyperlora.service.ui.lora_tray import Kept, with_one_more
from hyperlora.service.ui.sampling import Pictures, drawn, fraction, more, prompt_box
from hyperlora.service.ui.text import NO_PORTRAITS, presets, snippet


def photo_tab(api: Api, blocks: gr.Blocks, shelf: gr.State) -> None:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False, elem_classes="sides"):
        with gr.Column(scale=4, min_width=300):
            photos = gr.Gallery(
                label="Photos of one person", sources=["upload", "clipboard"], file_types=["image"], columns=3,
                height=210, object_fit="cover", fit_columns=False, interactive=True, elem_id="photos", buttons=[],
            )  # fmt: skip
            with gr.Accordion("Use the camera", open=False):
                camera = dropped("Camera", ["webcam"], height=280)
            prompt = prompt_box(api, blocks)
            strength = gr.Slider(0, 2, 1, step=0.05, label="Strength of the LoRA")
            with gr.Accordion("More", open=False, elem_id="more-photos"):
                name = gr.Textbox("me", label="Name of the file", max_length=60)
                steps, seed = more("photos")
            go = gr.Button("Make the LoRA", variant="primary", size="lg", elem_id="make")
        with gr.Column(scale=7, min_width=300):
            said = gr.HTML(visible=False, elem_id="said")
            portraits = gr.HTML(NO_PORTRAITS, elem_id="portraits")
            with gr.Column(visible=False) as result:
                with gr.Row():
                    diffusers = gr.DownloadButton("Download for diffusers", size="md", elem_id="download")
                    kohya = gr.DownloadButton("Download for ComfyUI, A1111", size="md", elem_id="download-kohya")
                program = code()

    async def make(
        photos: Any, prompt: str, strength: float, name: str, steps: int, seed: float | None, shelf_now: list[Kept],
        visitor: gr.Request,
    ) -> AsyncIterator[dict[Any, Any]]:  # fmt: skip
        files = contents(photos)
        if not files:
            raise refused("there is no photo yet: drop one, paste one, or use the camera")
        async with api.of(visitor) as server:
            yield {said: gr.HTML(status("Making the LoRA …", 0), visible=True)}
            began = time.perf_counter()
            lora = await server.make_lora(files, title=name, strength=strength)
            seconds = time.perf_counter() - began
            twin = await server.make_lora(files, title=name, strength=strength, format="kohya")
            (facts, *_), doubts = await server.models(), list(dict.fromkeys(server.notices))
            prompt = prompt.strip() or next(iter(presets(facts).values()))
            yield {
                diffusers: download(diffusers, lora, name),
                kohya: download(kohya, twin, name, kohya=True),
                program: gr.Code(snippet(facts["base"], f"{file_name(name)}.safetensors", prompt)),
                result: gr.Column(visible=True),
                shelf: with_one_more(shelf_now, name, lora),
            }
            took = f"The LoRA took {seconds:.1f} s"
            async for rows in drawn(server, prompt, [[lora], []], seed, steps=int(steps)):
                drawing = status(f"{took}; drawing portraits …", fraction(rows))
                yield {said: notice(doubts) + drawing, portraits: _shown(rows)}
            scores = await _likeness(server, files, rows) if facts["likeness"] and not doubts else None
            yield {said: notice(doubts) + status(f"{took}."), portraits: _shown(rows, scores)}

    def photographed(shot: str | None, photos: Any) -> Any:
        return [*(photos or []), (shot, None)] if shot else photos, None

    inputs = [photos, prompt, strength, name, steps, seed, shelf]
    outputs: list[Any] = [said, portraits, diffusers, kohya, program, result, shelf]
    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    made = go.click(make, inputs, outputs, **private)
    made.failure(lambda: gr.HTML(visible=False), None, said, **private)
    camera.input(photographed, [camera, photos], [photos, camera], **private)


async def _likeness(server: Asked, files: list[bytes], rows: list[Pictures]) -> list[list[float]]:
    return [await server.likeness(files, [p for p in row if p is not None]) for row in rows]


def _shown(rows: list[Pictures], scores: list[list[float]] | None = None) -> str:
    titles = ("With your LoRA", "Same prompt and seeds, without it")
    asides = [likeness(scores[0]), likeness(scores[1], words=False)] if scores else ["", ""]
    parts = [section(title, aside, row) for title, aside, row in zip(titles, asides, rows, strict=True)]
    scale = "Likeness is read by a separate network: 0 is anyone, 1 another real picture of the same person."
    return "".join(parts) + (f'<p class="aside">{scale}</p>' if scores else "")
