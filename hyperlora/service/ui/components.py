"""Images, warnings and downloads as the page shows them."""

import html
import io
import re
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, TypedDict
from urllib.parse import quote

import gradio as gr
from gradio.blocks import Block
from gradio.data_classes import ImageData
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image

from hyperlora.lora.io.negative_lora import make_negative_path
from hyperlora.service.ui.text import format_score, get_similarity_label

UploadSource = Literal["upload", "webcam", "clipboard"]
Updates = dict[Block, object]
"""New values of components, as an event handler yields them."""
_MAX_NAME_LENGTH: Final = 60


class EventOptions(TypedDict):
    """Options of all events of the page."""

    show_progress: Literal["hidden"]
    api_visibility: Literal["private"]


EVENT_OPTIONS: Final[EventOptions] = {"show_progress": "hidden", "api_visibility": "private"}


def make_image_input(
    label: str,
    sources: list[UploadSource],
    *,
    height: int,
    min_width: int = 160,
    elem_id: str | None = None,
) -> gr.Image:
    """Make an input for one image; its value is the path of the uploaded bytes.

    Args:
        label: What the visitor reads.
        sources: Where an image may come from.
        height: Pixels.
        min_width: Pixels.
        elem_id: Id of the HTML element.

    Returns:
        The component.
    """
    image_input = gr.Image(
        label=label,
        sources=sources,
        buttons=[],
        height=height,
        min_width=min_width,
        elem_id=elem_id,
    )
    # Gradio would decode the image itself; the API decides what an image is
    image_input.preprocess = _get_upload_path  # type: ignore[method-assign]
    return image_input


def _get_upload_path(payload: ImageData | None) -> str | None:
    return payload.path if payload is not None else None


def render_section(
    title: str,
    badge: str,
    images: Sequence[Image.Image | Path | None],
    captions: Sequence[str] = (),
) -> str:
    """Render a titled row of images.

    Args:
        title: Title of the row.
        badge: HTML beside the title; may be empty.
        images: The images; paths of uploads, which the browser fetches and decodes; None for one
            that is not there yet.
        captions: One per image, or none at all.

    Returns:
        HTML.
    """
    captions = captions or [""] * len(images)
    cells = "".join(map(_render_figure, images, captions))
    heading = f"<h3>{html.escape(title)}{badge}</h3>"
    return f'<section class="row">{heading}<div class="cells">{cells}</div></section>'


def render_similarity(similarities: Sequence[float], with_label: bool = True) -> str:
    """Render the mean identity similarity of a row of images.

    Args:
        similarities: One score per image.
        with_label: Whether the score is also said in plain words.

    Returns:
        HTML.
    """
    mean = sum(similarities) / len(similarities)
    label = f" – {get_similarity_label(mean)}" if with_label else ""
    text = f"similarity {format_score(mean)}{label}"
    return f'<span class="chip" data-similarity="{mean:.4f}">{text}</span>'


def render_warnings(warnings: Sequence[str]) -> str:
    """Render warnings in a box; empty without any."""
    if not warnings:
        return ""
    text = " ".join(f"{warning[:1].upper()}{warning[1:]}." for warning in warnings)
    return f'<div class="notice" role="alert">{html.escape(text, quote=False)}</div>'


def render_status(text: str, progress: float | None = None) -> str:
    """Render what the server does.

    Args:
        text: What it does.
        progress: Fraction that is done, for a bar; None for no bar.

    Returns:
        HTML.
    """
    bar = "" if progress is None else f'<progress max="1" value="{progress:.3f}"></progress>'
    return f'<div class="status" role="status"><span>{html.escape(text)}</span>{bar}</div>'


def make_code_block() -> gr.Code:
    """Make a block for a program to copy."""
    return gr.Code(
        language="python",
        label="In diffusers",
        interactive=False,
        lines=1,
        wrap_lines=True,
        show_line_numbers=False,
    )


def update_negative_download(button: gr.DownloadButton, path: str | None) -> gr.DownloadButton:
    """Put the LoRA for the negative branch of guidance behind a button, or hide the button.

    Args:
        button: The button.
        path: The ``.safetensors`` file; None for a model without one.

    Returns:
        The update of the button.
    """
    if path is None:
        return gr.DownloadButton(value=None, visible=False)
    return gr.DownloadButton(value=path, visible=True, interactive=True)


def update_download(
    button: gr.DownloadButton, path: str, readers: Sequence[str]
) -> gr.DownloadButton:
    """Put a LoRA file behind a button.

    Args:
        button: The button.
        path: The ``.safetensors`` file.
        readers: Programs that read the file.

    Returns:
        The update of the button.
    """
    label = f"Download for {', '.join(readers)}" if readers else "Download"
    return gr.DownloadButton(label, value=path, interactive=True)


def save_lora(
    button: gr.DownloadButton, data: bytes, name: str, *, is_negative: bool = False
) -> str:
    """Save a LoRA file in the folder of uploads.

    Args:
        button: The button that offers it.
        data: The ``.safetensors`` file.
        name: What the visitor calls the LoRA.
        is_negative: Whether it is for the negative branch of guidance.

    Returns:
        The path of the file.
    """
    path = Path(f"{make_file_name(name)}.safetensors")
    path = make_negative_path(path) if is_negative else path
    return save_bytes_to_cache(data, path.name, button.GRADIO_CACHE)


def make_file_name(name: str) -> str:
    """Turn any text into a file name (without suffix) that every file system takes."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")[:_MAX_NAME_LENGTH] or "lora"


def _render_figure(image: Image.Image | Path | None, caption: str) -> str:
    figcaption = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    if image is None:
        return f'<figure><div class="waiting"></div>{figcaption}</figure>'
    if isinstance(image, Path):
        source = f"gradio_api/file={quote(str(image))}"
    else:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        source = f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"
    alt = html.escape(caption) or "portrait"
    return f'<figure><img src="{source}" alt="{alt}">{figcaption}</figure>'
