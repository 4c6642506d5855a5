"""Drawing several pictures through the API, and the inputs that all tabs share."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import gradio as gr
from PIL import Image

from hyperlora.service.ui.api_client import Api, Asked
from hyperlora.service.ui.text import presets

T = TypeVar("T")
PICTURES: Final = 4
"""In each row."""
Pictures = list[Image.Image | None]


async def drawn(
    server: Asked, prompt: str, rows: Sequence[Sequence[bytes]], seed: float | None, **options: Any
) -> AsyncIterator[list[Pictures]]:
    """Rows of ``PICTURES`` with the LoRAs of each row and the same seeds, told again whenever one more is there. A row
    is drawn in one batch."""
    grid: list[Pictures] = [[None] * PICTURES for _ in rows]
    first = int(seed or 0)  # an emptied field is None

    async def one(row: int, i: int) -> None:
        grid[row][i] = await server.draw(prompt, rows[row], seed=first + i, **options)

    for row in range(len(rows)):
        yield grid
        async with together(one(row, i) for i in range(PICTURES)) as tasks:
            for done in asyncio.as_completed(tasks):
                await done
                yield grid


@asynccontextmanager
async def together(work: Iterable[Coroutine[Any, Any, T]]) -> AsyncIterator[list["asyncio.Task[T]"]]:
    """Tasks that end with the block: after an error, or when the visitor leaves, nobody waits for the others."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def fraction(grid: list[Pictures]) -> float:
    """How many of the pictures are there."""
    cells = [cell for row in grid for cell in row]
    return sum(cell is not None for cell in cells) / len(cells)


def prompt_box(api: Api, blocks: gr.Blocks) -> gr.Textbox:
    """A prompt with chips of examples in the words that the server's model knows."""
    prompt = gr.Textbox(label="Prompt", lines=2, max_lines=4)
    labels = list(presets({"trigger_phrase": "", "base": ""}))
    chips = gr.Dataset(
        components=[gr.Textbox(visible=False)], samples=[[""]] * len(labels), sample_labels=labels, type="index",
        show_label=False, elem_classes="chips",
    )  # fmt: skip

    async def greet(visitor: gr.Request) -> Any:
        async with api.of(visitor) as server:
            known = presets((await server.models())[0])
        return next(iter(known.values())), gr.Dataset(samples=[[p] for p in known.values()], sample_labels=list(known))

    async def chosen(index: int, visitor: gr.Request) -> str:
        async with api.of(visitor) as server:
            return list(presets((await server.models())[0]).values())[index]

    blocks.load(greet, None, [prompt, chips], show_progress="hidden", api_visibility="private")
    chips.click(chosen, chips, prompt, show_progress="hidden", api_visibility="private")
    return prompt


def more(tab: str) -> tuple[gr.Slider, gr.Number]:
    """Denoising steps and the seed of the first picture."""
    with gr.Row():
        return (
            gr.Slider(4, 50, 20, step=1, label="Steps", min_width=140, elem_id=f"steps-{tab}"),
            gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31, min_width=100),
        )
