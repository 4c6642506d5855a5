"""Pictures, notices and downloads as the page shows them."""

import html
import io
import re
from base64 import b64encode
from collections.abc import Sequence
from typing import Any, Literal

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image, ImageOps

from hyperlora.data.images import read_image
from hyperlora.service.ui.text import format_score, get_similarity_label

UploadSource = Literal["upload", "webcam", "clipboard"]


def make_image_input(label: str, sources: list[UploadSource], **options: Any) -> gr.Image:
    """A place for a picture; what it gives is the path of the bytes as they came: the API decides what a picture is."""
    image_input = gr.Image(label=label, sources=sources, buttons=[], **options)
    image_input.preprocess = lambda payload: payload.path if payload else None  # type: ignore[method-assign]
    return image_input


def render_section(
    title: str, badge: str, images: Sequence[Image.Image | None], captions: Sequence[str] = ()
) -> str:
    """A titled row of pictures; None is one that is not there yet."""
    captions = captions or [""] * len(images)
    cells = "".join(_render_figure(p, c) for p, c in zip(images, captions, strict=True))
    return f'<section class="row"><h3>{html.escape(title)}{badge}</h3><div class="cells">{cells}</div></section>'


def render_similarity(similarities: Sequence[float], with_label: bool = True) -> str:
    """The mean likeness of a row, beside its title."""
    mean = sum(similarities) / len(similarities)
    text = f"likeness {format_score(mean)}" + (
        f" – {get_similarity_label(mean)}" if with_label else ""
    )
    return f'<span class="chip" data-likeness="{mean:.4f}">{text}</span>'


def render_warnings(warnings: Sequence[str]) -> str:
    """What may be wrong with the input, in a box; nothing if nothing is."""
    text = " ".join(f"{s[:1].upper()}{s[1:]}." for s in warnings)
    return (
        f'<div class="notice" role="alert">{html.escape(text, quote=False)}</div>' if text else ""
    )


def render_status(text: str, progress: float | None = None) -> str:
    """What is being done, with a bar up to ``progress`` (of 1) while it lasts."""
    bar = "" if progress is None else f'<progress max="1" value="{progress:.3f}"></progress>'
    return f'<div class="status" role="status"><span>{html.escape(text)}</span>{bar}</div>'


def make_thumbnail(data: bytes, size: int = 256) -> Image.Image:
    """The centre square of a picture file."""
    return ImageOps.fit(read_image(data), (size, size))


def make_code_block() -> gr.Code:
    """A program to copy."""
    return gr.Code(
        language="python",
        label="In diffusers",
        interactive=False,
        lines=1,
        wrap_lines=True,
        show_line_numbers=False,
    )


def update_download(button: gr.DownloadButton, data: bytes, name: str, kohya: bool = False) -> Any:
    """The button with the file behind it."""
    download_name = f"{make_file_name(name)}{'-kohya' if kohya else ''}.safetensors"
    path = save_bytes_to_cache(data, download_name, button.GRADIO_CACHE)
    return gr.DownloadButton(value=path, interactive=True)


def make_file_name(name: str) -> str:
    """What every file system takes."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")[:60] or "lora"


def _render_figure(image: Image.Image | None, caption: str) -> str:
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    if image is None:
        return f'<figure><div class="waiting"></div>{below}</figure>'
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    source = f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"
    return (
        f'<figure><img src="{source}" alt="{html.escape(caption) or "portrait"}">{below}</figure>'
    )
