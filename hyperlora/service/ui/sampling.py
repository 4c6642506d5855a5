"""Grids of images through the API, and the inputs that all tabs share."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import gradio as gr
from PIL import Image

from hyperlora.errors import InvalidArgumentError
from hyperlora.seeds import MAX_SEED, compute_seed, validate_seed
from hyperlora.service.ui.api_client import Api, RecordingClient, make_ui_error
from hyperlora.service.ui.components import EVENT_OPTIONS
from hyperlora.service.ui.text import PRESET_LABELS, get_prompt_presets

ResultT = TypeVar("ResultT")
IMAGES_PER_ROW: Final = 4
ImageRow = list[Image.Image | None]
"""A row of images; None for one that is not there yet."""

SCHEDULERS: Final = (
    "LCM",
    "TCD",
    "EulerDiscrete",
    "DPMSolverMultistepKarras",
    "UniPCMultistep",
    "FlowMatchEulerDiscrete",
)
"""Samplers that the page suggests; a base refuses those that are not for it."""


@dataclass(frozen=True)
class GridRequest:
    """A grid of images of one prompt, one row per combination of LoRAs.

    Attributes:
        prompt: The prompt of all images.
        lora_rows: LoRA files of each row.
        seed: Seed of the first image of each row.
        num_inference_steps: Denoising steps.
        scheduler: Sampler by diffusers' name; empty for the base's own.
        strategy: How the LoRAs of a row are combined.
        lora_weights: One weight per LoRA of each row; None for those that the files recommend.
        negative_lora: LoRA file for the negative branch of guidance, in rows of one merged LoRA;
            None for what its header asks for.
    """

    prompt: str
    lora_rows: Sequence[Sequence[bytes]]
    seed: int
    num_inference_steps: int
    scheduler: str = ""
    strategy: str = "merge"
    lora_weights: Sequence[float] | None = None
    negative_lora: bytes | None = None

    def get_row_options(self, row: int) -> dict[str, object]:
        """Return the further fields of an image of a row."""
        is_single = len(self.lora_rows[row]) == 1 and self.strategy == "merge"
        if self.negative_lora is None or not is_single:
            return {}
        return {"negative_lora": {"content": b64encode(self.negative_lora).decode()}}


async def sample_grid(
    client: RecordingClient, request: GridRequest
) -> AsyncIterator[list[ImageRow]]:
    """Generate a grid row by row; the images of a row share a batch.

    Args:
        client: The client of the visitor.
        request: What to generate.

    Yields:
        The same grid, again whenever one more image is there.
    """
    grid: list[ImageRow] = [[None] * IMAGES_PER_ROW for _ in request.lora_rows]

    async def generate_cell(row: int, column: int) -> None:
        grid[row][column] = await client.generate_image(
            request.prompt,
            request.lora_rows[row],
            seed=compute_seed(request.seed, column),
            num_inference_steps=request.num_inference_steps,
            scheduler=request.scheduler or None,
            strategy=request.strategy,
            weights=request.lora_weights,
            **request.get_row_options(row),
        )

    for row in range(len(request.lora_rows)):
        yield grid
        async with run_tasks(generate_cell(row, i) for i in range(IMAGES_PER_ROW)) as tasks:
            for task in asyncio.as_completed(tasks):
                await task
                yield grid


@asynccontextmanager
async def run_tasks(
    coroutines: Iterable[Coroutine[object, object, ResultT]],
) -> AsyncIterator[list["asyncio.Task[ResultT]"]]:
    """Run coroutines as tasks that end with the context, also after an error.

    Args:
        coroutines: What to run.

    Yields:
        One task per coroutine.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def compute_progress(grid: list[ImageRow]) -> float:
    """Compute the fraction of a grid's images that are there."""
    cells = [cell for row in grid for cell in row]
    return sum(cell is not None for cell in cells) / len(cells)


def build_prompt_box(api: Api, blocks: gr.Blocks) -> gr.Textbox:
    """Build a prompt box with chips of examples for the server's model.

    Args:
        api: The API, which knows the model.
        blocks: The page.

    Returns:
        The text box.
    """
    prompt = gr.Textbox(label="Prompt", lines=2, max_lines=4)
    chips = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=[[""]] * len(PRESET_LABELS),
        sample_labels=list(PRESET_LABELS),
        type="index",
        show_label=False,
        elem_classes="chips",
    )

    async def load_presets(visitor: gr.Request) -> tuple[str, gr.Dataset]:
        async with api.open_client(visitor) as client:
            presets = get_prompt_presets((await client.load_model_infos())[0])
        samples = [[preset] for preset in presets.values()]
        return samples[0][0], gr.Dataset(samples=samples, sample_labels=list(presets))

    async def get_preset(index: int, visitor: gr.Request) -> str:
        async with api.open_client(visitor) as client:
            presets = get_prompt_presets((await client.load_model_infos())[0])
        return list(presets.values())[index]

    blocks.load(load_presets, None, [prompt, chips], **EVENT_OPTIONS)
    chips.click(get_preset, chips, prompt, **EVENT_OPTIONS)
    return prompt


def parse_seed(text: str) -> int:
    """Parse the field of the seed, which is text: numbers of a browser end at 2^53.

    Args:
        text: What the visitor typed; nothing counts as 0.

    Returns:
        From 0 to ``MAX_SEED``.

    Raises:
        gr.Error: It is no such number.
    """
    digits = text.strip()
    try:
        return validate_seed(int(digits or "0"))
    except (ValueError, InvalidArgumentError):
        raise make_ui_error(
            f"seed: a whole number from 0 to {MAX_SEED} expected, got {digits[:40]!r}"
        ) from None


def build_sampling_options(tab: str) -> tuple[gr.Slider, gr.Textbox, gr.Dropdown]:
    """Build the inputs for denoising steps, the seed of the first image, and the sampler."""
    with gr.Row():
        return (
            gr.Slider(1, 50, 20, step=1, label="Steps", min_width=140, elem_id=f"steps-{tab}"),
            gr.Textbox("0", label="Seed", max_lines=1, max_length=40, min_width=100),
            gr.Dropdown(
                [("the base's own", ""), *SCHEDULERS],
                value="",
                label="Sampler",
                info="any name of diffusers",
                allow_custom_value=True,
                min_width=160,
                elem_id=f"scheduler-{tab}",
            ),
        )
