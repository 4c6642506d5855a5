"""Compose: several LoRAs in one image, each with its weight."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.blocks import Block

from hyperlora.errors import HyperloraError, InvalidLoraFileError
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.safetensors_file import MAX_UPLOAD_HEADER_BYTES
from hyperlora.service.engine.lora_files import MAX_PARAMETERS
from hyperlora.service.ui.api_client import Api, make_ui_error, read_uploads
from hyperlora.service.ui.components import EVENT_OPTIONS, render_section, render_status
from hyperlora.service.ui.lora_tray import MAX_ITEMS, TrayItem, add_item
from hyperlora.service.ui.sampling import (
    GridRequest,
    build_prompt_box,
    build_sampling_options,
    compute_progress,
    parse_seed,
    sample_grid,
)
from hyperlora.service.ui.text import EMPTY_COMPOSITION, EMPTY_TRAY, STRATEGIES


@dataclass(frozen=True)
class _ComposeTab:
    """Handler of the button."""

    api: Api

    async def generate_grid(
        self,
        visitor: gr.Request,
        items: list[TrayItem],
        strategy: str,
        prompt: str,
        num_steps: int,
        seed: str,
        scheduler: str,
        *lora_weights: float,
    ) -> AsyncIterator[str]:
        """Generate a row of images with all LoRAs of the tray."""
        if not items:
            raise make_ui_error("there is no LoRA yet: make one from photos, or add a file")
        negative_path = items[0].negative_path
        request = GridRequest(
            prompt,
            [read_uploads([item.path for item in items])],
            parse_seed(seed),
            int(num_steps),
            scheduler,
            strategy,
            lora_weights[: len(items)],
            read_uploads([negative_path])[0] if negative_path and len(items) == 1 else None,
        )
        title = " + ".join(item.name for item in items)
        async with self.api.open_client(visitor) as client:
            async for grid in sample_grid(client, request):
                status_html = render_status("Generating …", compute_progress(grid))
                yield status_html + render_section(title, "", grid[0])
            yield render_section(title, "", grid[0])


def build_compose_tab(
    api: Api, blocks: gr.Blocks, tray: gr.State, max_lora_bytes: int = 12 << 20
) -> None:
    """Lay out the tab and connect its events.

    Args:
        api: The API.
        blocks: The page.
        tray: The LoRAs of the visitor.
        max_lora_bytes: Largest LoRA file that may be added.
    """

    def add_uploads(paths: list[str] | None, items: list[TrayItem]) -> tuple[list[TrayItem], None]:
        return _add_uploads(paths or [], items, max_lora_bytes), None

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
                num_steps, seed, scheduler = build_sampling_options("compose")
            with gr.Row():
                clear_button = gr.Button("Clear", min_width=100)
                generate_button = gr.Button(
                    "Generate", variant="primary", elem_id="generate", min_width=160, scale=2
                )
        with gr.Column(scale=7, min_width=300):
            result_html = gr.HTML(EMPTY_COMPOSITION, elem_id="composition")

    inputs: list[Block] = [tray, strategy, prompt, num_steps, seed, scheduler, *weights]
    files.upload(add_uploads, [files, tray], [tray, files], **EVENT_OPTIONS)
    tray.change(_update_sliders, tray, [empty_message, *weights], **EVENT_OPTIONS)
    clear_button.click(lambda: ([], EMPTY_COMPOSITION), None, [tray, result_html], **EVENT_OPTIONS)
    generate_button.click(_ComposeTab(api).generate_grid, inputs, result_html, **EVENT_OPTIONS)


def _add_uploads(
    paths: Sequence[str], items: list[TrayItem], max_lora_bytes: int
) -> list[TrayItem]:
    """Add uploaded files to the tray; delete those that are no LoRAs."""
    for path in map(Path, paths[:MAX_ITEMS]):
        try:
            _check_lora_file(path, max_lora_bytes)
        except HyperloraError as error:
            path.unlink(missing_ok=True)
            raise make_ui_error(f"{path.name!r}: {error}") from error
        items = add_item(items, path.stem, str(path))
    return items


def _check_lora_file(path: Path, max_bytes: int) -> None:
    """Check that an upload is a LoRA of some base, and not too large for the API."""
    size = path.stat().st_size if path.is_file() else 0
    if size > max_bytes:
        raise InvalidLoraFileError(
            f"the file has {size / 2**20:.1f} MiB, at most {max_bytes / 2**20:.3g} MiB are taken: "
            "resize the LoRA to a smaller rank"
        )
    (data,) = read_uploads([path])
    load_lora(data, max_parameters=MAX_PARAMETERS, max_header_bytes=MAX_UPLOAD_HEADER_BYTES)


def _update_sliders(items: list[TrayItem]) -> list[Block]:
    """Show one slider per LoRA of the tray."""
    sliders = [gr.Slider(label=f"Weight of {item.name}", visible=True) for item in items]
    hidden_sliders = [gr.Slider(visible=False)] * (MAX_ITEMS - len(items))
    return [gr.HTML(visible=not items), *sliders, *hidden_sliders]
