"""Drawing several pictures through the API, and the inputs that all tabs share."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import gradio as gr
from PIL import Image

from hyperlora.service.ui.api_client import Api, RecordingClient
from hyperlora.service.ui.text import get_prompt_presets

T = TypeVar("T")
IMAGES_PER_ROW: Final = 4
"""In each row."""
ImageRow = list[Image.Image | None]


async def sample_grid(
    client: RecordingClient,
    prompt: str,
    lora_rows: Sequence[Sequence[bytes]],
    seed: float | None,
    **options: Any,
) -> AsyncIterator[list[ImageRow]]:
    """Rows of ``IMAGES_PER_ROW`` with the LoRAs of each row and the same seeds, told again whenever one more is there. A row
    is drawn in one batch."""
    grid: list[ImageRow] = [[None] * IMAGES_PER_ROW for _ in lora_rows]
    first_seed = int(seed or 0)  # an emptied field is None

    async def generate_cell(row: int, i: int) -> None:
        grid[row][i] = await client.generate_image(
            prompt, lora_rows[row], seed=first_seed + i, **options
        )

    for row in range(len(lora_rows)):
        yield grid
        async with run_tasks(generate_cell(row, i) for i in range(IMAGES_PER_ROW)) as tasks:
            for task in asyncio.as_completed(tasks):
                await task
                yield grid


@asynccontextmanager
async def run_tasks(
    coroutines: Iterable[Coroutine[Any, Any, T]],
) -> AsyncIterator[list["asyncio.Task[T]"]]:
    """Tasks that end with the block: after an error, or when the visitor leaves, nobody waits for the others."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def compute_progress(grid: list[ImageRow]) -> float:
    """How many of the pictures are there."""
    cells = [cell for row in grid for cell in row]
    return sum(cell is not None for cell in cells) / len(cells)


def build_prompt_box(api: Api, blocks: gr.Blocks) -> gr.Textbox:
    """A prompt with chips of examples in the words that the server's model knows."""
    prompt = gr.Textbox(label="Prompt", lines=2, max_lines=4)
    labels = list(get_prompt_presets({"trigger_phrase": "", "base": ""}))
    chips = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=[[""]] * len(labels),
        sample_labels=labels,
        type="index",
        show_label=False,
        elem_classes="chips",
    )

    async def load_presets(visitor: gr.Request) -> Any:
        async with api.open_client(visitor) as client:
            presets_by_label = get_prompt_presets((await client.list_models())[0])
        return next(iter(presets_by_label.values())), gr.Dataset(
            samples=[[p] for p in presets_by_label.values()], sample_labels=list(presets_by_label)
        )

    async def get_preset(index: int, visitor: gr.Request) -> str:
        async with api.open_client(visitor) as client:
            return list(get_prompt_presets((await client.list_models())[0]).values())[index]

    blocks.load(
        load_presets, None, [prompt, chips], show_progress="hidden", api_visibility="private"
    )
    chips.click(get_preset, chips, prompt, show_progress="hidden", api_visibility="private")
    return prompt


def build_sampling_options(tab: str) -> tuple[gr.Slider, gr.Number]:
    """Denoising steps and the seed of the first picture."""
    with gr.Row():
        return (
            gr.Slider(4, 50, 20, step=1, label="Steps", min_width=140, elem_id=f"steps-{tab}"),
            gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31, min_width=100),
        )
