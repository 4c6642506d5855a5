"""From photos: a LoRA of a person, portraits with and without it, and their similarity."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import gradio as gr
from gradio.blocks import Block

from hyperlora.service.ui.api_client import (
    EDIT_KINDS,
    Api,
    RecordingClient,
    Upload,
    make_ui_error,
    read_uploads,
)
from hyperlora.service.ui.components import (
    EVENT_OPTIONS,
    Updates,
    make_code_block,
    make_file_name,
    make_image_input,
    render_section,
    render_similarity,
    render_status,
    render_warnings,
    save_lora,
    update_download,
    update_negative_download,
)
from hyperlora.service.ui.lora_tray import TrayItem, add_item
from hyperlora.service.ui.sampling import (
    GridRequest,
    ImageRow,
    build_prompt_box,
    build_sampling_options,
    compute_progress,
    parse_seed,
    sample_grid,
)
from hyperlora.service.ui.text import (
    EMPTY_PORTRAITS,
    NO_IMAGES,
    SIMILARITY_NOTE,
    get_prompt_presets,
    make_snippet,
    render_card,
    render_notes,
)


@dataclass(frozen=True)
class _PhotoTab:
    """Handler of the button, and the components that it updates."""

    api: Api
    tray: gr.State
    status_html: gr.HTML
    portraits_html: gr.HTML
    download: gr.DownloadButton
    negative_download: gr.DownloadButton
    code_block: gr.Code
    result: gr.Column

    async def create_lora(
        self,
        photos: list[Upload] | None,
        prompt: str,
        strength: float,
        name: str,
        num_steps: int,
        seed: str,
        scheduler: str,
        tray_items: list[TrayItem],
        model: str | None,
        visitor: gr.Request,
    ) -> AsyncIterator[Updates]:
        """Make the LoRA, its files and portraits, with the model of a name."""
        files = read_uploads(photos)
        if not files:
            raise make_ui_error("there is no photo yet: drop one, paste one, or use the camera")
        first_seed = parse_seed(seed)
        async with self.api.open_client(visitor) as client:
            yield {self.status_html: gr.HTML(render_status("Making the LoRA …", 0), visible=True)}
            start_time = time.perf_counter()
            model_info = await client.load_photo_model_info(model)
            lora, negative = await client.create_lora_files(
                files, title=name, strength=strength, model=model_info.id
            )
            elapsed_text = f"The LoRA took {time.perf_counter() - start_time:.1f} s"
            model_info = await client.load_photo_model_info(model_info.id)  # loaded now
            prompt = prompt.strip() or next(iter(get_prompt_presets(model_info).values()))
            if not prompt.startswith(model_info.prompt_prefix.strip(", ")):
                prompt = model_info.prompt_prefix + prompt
            file_name = f"{make_file_name(name)}.safetensors"
            path = save_lora(self.download, lora, name)
            negative_path = None
            if negative is not None:
                negative_path = save_lora(self.negative_download, negative, name, is_negative=True)
            snippet = make_snippet(model_info.base, file_name, prompt, model_info.strength)
            yield {
                self.download: update_download(self.download, path, model_info.lora_readers),
                self.negative_download: update_negative_download(
                    self.negative_download, negative_path
                ),
                self.code_block: gr.Code(snippet),
                self.result: gr.Column(visible=True),
                self.tray: add_item(tray_items, name, path, negative_path),
            }
            if not model_info.can_generate_images:
                yield {
                    self.status_html: render_warnings(client.unique_warnings)
                    + render_status(f"{elapsed_text}. {NO_IMAGES}")
                    + render_notes(client.notes),
                    self.portraits_html: EMPTY_PORTRAITS,
                }
                return
            request = GridRequest(
                prompt,
                [[lora], []],
                first_seed,
                int(num_steps),
                scheduler,
                negative_lora=negative,
            )
            scored_files = files if model_info.supports_identity_similarity else []
            async for updates in self._generate_portraits(
                client, request, scored_files, elapsed_text
            ):
                yield updates

    async def _generate_portraits(
        self,
        client: RecordingClient,
        request: GridRequest,
        photo_files: list[bytes],
        elapsed_text: str,
    ) -> AsyncIterator[Updates]:
        """Generate the grid, then score it against the photos unless the API warned of them."""
        warnings_html = render_warnings(client.unique_warnings)
        async for grid in sample_grid(client, request):
            progress_html = render_status(
                f"{elapsed_text}; generating portraits …", compute_progress(grid)
            )
            yield {
                self.status_html: warnings_html + progress_html,
                self.portraits_html: _render_portraits(grid),
            }
        similarities = None
        if photo_files and not warnings_html:
            similarities = await _compute_similarities(client, photo_files, grid)
        yield {
            self.status_html: warnings_html
            + render_status(f"{elapsed_text}.")
            + render_notes(client.notes),
            self.portraits_html: _render_portraits(grid, similarities),
        }


def build_photo_tab(api: Api, blocks: gr.Blocks, tray: gr.State) -> None:
    """Lay out the tab and connect its events.

    Args:
        api: The API.
        blocks: The page.
        tray: The LoRAs of the visitor.
    """
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
            model = gr.Dropdown([], label="Model", visible=False, elem_id="model")
            card_html = gr.HTML(visible=False, elem_id="model-card")
            prompt = build_prompt_box(api, blocks)
            strength = gr.Slider(0, 2, 1, step=0.05, label="Strength of the LoRA")
            with gr.Accordion("More", open=False, elem_id="more-photos"):
                name = gr.Textbox("me", label="Name of the file", max_length=60)
                num_steps, seed, scheduler = build_sampling_options("photos")
            create_button = gr.Button("Make the LoRA", variant="primary", size="lg", elem_id="make")
        with gr.Column(scale=7, min_width=300):
            status_html = gr.HTML(visible=False, elem_id="status")
            portraits_html = gr.HTML(EMPTY_PORTRAITS, elem_id="portraits")
            with gr.Column(visible=False) as result:
                download = gr.DownloadButton("Download", size="md", elem_id="download")
                negative_download = gr.DownloadButton(
                    "Download the LoRA for negative prompts",
                    size="md",
                    visible=False,
                    elem_id="download-negative",
                )
                code_block = make_code_block()

    tab = _PhotoTab(
        api, tray, status_html, portraits_html, download, negative_download, code_block, result
    )
    inputs: list[Block] = [photos, prompt, strength, name, num_steps, seed, scheduler, tray, model]
    outputs: list[Block] = [
        status_html,
        portraits_html,
        download,
        negative_download,
        code_block,
        result,
        tray,
    ]
    create_event = create_button.click(tab.create_lora, inputs, outputs, **EVENT_OPTIONS)
    create_event.failure(lambda: gr.HTML(visible=False), None, status_html, **EVENT_OPTIONS)

    async def load_models(visitor: gr.Request) -> tuple[gr.Dropdown, gr.HTML]:
        return await _load_models(api, visitor)

    async def show_model(name: str, visitor: gr.Request) -> tuple[str, str]:
        return await _show_model(api, name, visitor)

    # functions, no partials: Gradio finds the visitor by the annotation
    blocks.load(load_models, None, [model, card_html], **EVENT_OPTIONS)
    model.input(show_model, model, [card_html, prompt], **EVENT_OPTIONS)
    camera.input(_add_camera_photo, [camera, photos], [photos, camera], **EVENT_OPTIONS)


async def _load_models(api: Api, visitor: gr.Request) -> tuple[gr.Dropdown, gr.HTML]:
    """List the models from photos, with the card of the first; nothing shows if there is one."""
    async with api.open_client(visitor) as client:
        infos = [info for info in await client.load_model_infos() if info.kind not in EDIT_KINDS]
    is_visible, names = len(infos) > 1, [info.id for info in infos]
    dropdown = gr.Dropdown(choices=[*names], value=names[0], visible=is_visible)
    return dropdown, gr.HTML(render_card(infos[0]), visible=is_visible)


async def _show_model(api: Api, name: str, visitor: gr.Request) -> tuple[str, str]:
    """Show the card of a model, and a prompt that it knows."""
    async with api.open_client(visitor) as client:
        info = await client.load_photo_model_info(name)
    return render_card(info), next(iter(get_prompt_presets(info).values()))


def _add_camera_photo(
    camera_photo: str | None, photos: list[Upload] | None
) -> tuple[list[Upload] | None, None]:
    """Move a photo of the camera to the gallery, and empty the camera field."""
    if camera_photo is None:
        return photos, None
    return [*(photos or []), (camera_photo, None)], None


async def _compute_similarities(
    client: RecordingClient, files: list[bytes], grid: list[ImageRow]
) -> list[list[float]]:
    """Compute the identity similarity of each image of a grid, [rows][images]."""
    return [
        await client.compute_identity_similarity(files, [p for p in row if p is not None])
        for row in grid
    ]


def _render_portraits(grid: list[ImageRow], similarities: list[list[float]] | None = None) -> str:
    """Render the row with the LoRA above the row without it."""
    titles = ("With your LoRA", "Same prompt and seeds, without it")
    badges = ["", ""]
    if similarities:
        badges = [
            render_similarity(similarities[0]),
            render_similarity(similarities[1], with_label=False),
        ]
    sections = "".join(map(render_section, titles, badges, grid))
    return sections + (f'<p class="aside">{SIMILARITY_NOTE}</p>' if similarities else "")
