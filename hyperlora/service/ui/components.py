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
from hyperlora.service.ui.text import alike, number

Source = Literal["upload", "webcam", "clipboard"]


def dropped(label: str, sources: list[Source], **options: Any) -> gr.Image:
    """A place for a picture; what it gives is the path of the bytes as they came: the API decides what a picture is."""
    place = gr.Image(label=label, sources=sources, buttons=[], **options)
    place.preprocess = lambda payload: payload.path if payload else None  # type: ignore[method-assign]
    return place


def section(title: str, aside: str, pictures: Sequence[Image.Image | None], captions: Sequence[str] = ()) -> str:
    """A titled row of pictures; None is one that is not there yet."""
    captions = captions or [""] * len(pictures)
    cells = "".join(_figure(p, c) for p, c in zip(pictures, captions, strict=True))
    return f'<section class="row"><h3>{html.escape(title)}{aside}</h3><div class="cells">{cells}</div></section>'


def likeness(scores: Sequence[float], words: bool = True) -> str:
    """The mean likeness of a row, beside its title."""
    mean = sum(scores) / len(scores)
    said = f"likeness {number(mean)}" + (f" – {alike(mean)}" if words else "")
    return f'<span class="chip" data-likeness="{mean:.4f}">{said}</span>'


def notice(sentences: Sequence[str]) -> str:
    """What may be wrong with the input, in a box; nothing if nothing is."""
    said = " ".join(f"{s[:1].upper()}{s[1:]}." for s in sentences)
    return f'<div class="notice" role="alert">{html.escape(said, quote=False)}</div>' if said else ""


def status(said: str, done: float | None = None) -> str:
    """What is being done, with a bar up to ``done`` (of 1) while it lasts."""
    bar = "" if done is None else f'<progress max="1" value="{done:.3f}"></progress>'
    return f'<div class="status" role="status"><span>{html.escape(said)}</span>{bar}</div>'


def thumbnail(data: bytes, size: int = 256) -> Image.Image:
    """The centre square of a picture file."""
    return ImageOps.fit(read_image(data), (size, size))


def code() -> gr.Code:
    """A program to copy."""
    return gr.Code(
        language="python", label="In diffusers", interactive=False, lines=1, wrap_lines=True, show_line_numbers=False
    )


def download(button: gr.DownloadButton, data: bytes, name: str, kohya: bool = False) -> Any:
    """The button with the file behind it."""
    file = f"{file_name(name)}{'-kohya' if kohya else ''}.safetensors"
    path = save_bytes_to_cache(data, file, button.GRADIO_CACHE)
    return gr.DownloadButton(value=path, interactive=True)


def file_name(name: str) -> str:
    """What every file system takes."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")[:60] or "lora"


def _figure(picture: Image.Image | None, caption: str) -> str:
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    if picture is None:
        return f'<figure><div class="waiting"></div>{below}</figure>'
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    source = f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"
    return f'<figure><img src="{source}" alt="{html.escape(caption) or "portrait"}">{below}</figure>'
