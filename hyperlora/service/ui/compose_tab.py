"""Compose: several LoRAs in one picture, each with its weight."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from hyperlora.service.ui.api_client import Api, contents, refused
from hyperlora.service.ui.components import section, status
from hyperlora.service.ui.lora_tray import MOST, Kept, with_one_more
from hyperlora.service.ui.sampling import drawn, fraction, more, prompt_box
from hyperlora.service.ui.text import NO_COMPOSITION, NO_LORAS, STRATEGIES


def compose_tab(api: Api, blocks: gr.Blocks, shelf: gr.State) -> None:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False, elem_classes="sides"):
        with gr.Column(scale=4, min_width=300):
            files = gr.File(
                label="Add LoRA files", file_count="multiple", file_types=[".safetensors"], height=160, elem_id="files"
            )
            nothing = gr.HTML(NO_LORAS)
            weights = [gr.Slider(-1, 2, 1, step=0.05, visible=False) for _ in range(MOST)]
            strategy = gr.Radio(STRATEGIES, value="merge", label="How they work together")
            prompt = prompt_box(api, blocks)
            with gr.Accordion("More", open=False, elem_id="more-compose"):
                steps, seed = more("compose")
            with gr.Row():
                clear = gr.Button("Clear", min_width=100)
                go = gr.Button("Draw", variant="primary", elem_id="draw", min_width=160, scale=2)
        with gr.Column(scale=7, min_width=300):
            pictures = gr.HTML(NO_COMPOSITION, elem_id="composed")

    def added(paths: list[str] | None, now: list[Kept]) -> Any:
        for path, data in zip(paths or [], contents(paths), strict=True):
            now = with_one_more(now, Path(path).stem, data)
        return now, None

    def shown(now: list[Kept]) -> Any:
        sliders = [gr.Slider(label=f"Weight of {kept.name}", visible=True) for kept in now]
        return [gr.HTML(visible=not now), *sliders, *[gr.Slider(visible=False)] * (MOST - len(now))]

    async def draw(
        visitor: gr.Request,
        now: list[Kept],
        strategy: str,
        prompt: str,
        steps: int,
        seed: float | None,
        *amounts: float,
    ) -> AsyncIterator[str]:  # fmt: skip
        if not now:
            raise refused("there is no LoRA yet: make one from photos, or add a file")
        options = {"strategy": strategy, "weights": amounts[: len(now)], "steps": int(steps)}
        title = " + ".join(kept.name for kept in now)
        async with api.of(visitor) as server:
            async for grid in drawn(server, prompt, [[kept.data for kept in now]], seed, **options):
                yield status("Drawing …", fraction(grid)) + section(title, "", grid[0])
            yield section(title, "", grid[0])

    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    files.upload(added, [files, shelf], [shelf, files], **private)
    shelf.change(shown, shelf, [nothing, *weights], **private)
    clear.click(lambda: ([], NO_COMPOSITION), None, [shelf, pictures], **private)
    go.click(draw, [shelf, strategy, prompt, steps, seed, *weights], pictures, **private)
