"""HTTP requests as bytes, and their parts: forms, images, chunks of PNG files."""

import io
import struct
import zlib
from typing import Final

import numpy as np
from PIL import Image

Random = np.random.Generator
HOST: Final = "127.0.0.1"
FORM: Final = "multipart/form-data; boundary=b"


def build_request(
    path: str, body: bytes = b"", content_type: str = FORM, method: str = "POST", **headers: str
) -> bytes:
    """Build an HTTP/1.1 request.

    Args:
        path: Path and query.
        body: Bytes of the body.
        content_type: Content type of the body.
        method: HTTP method.
        headers: Headers to add or to replace, with ``_`` for ``-``.

    Returns:
        Bytes of the request.
    """
    usual = {
        "host": HOST,
        "content-type": content_type,
        "content-length": str(len(body)),
        "connection": "close",
    }
    all_headers = usual | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in all_headers.items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body


def build_form(*parts: tuple[str, bytes | str]) -> bytes:
    """Build a multipart body; bytes become files, strings become fields."""
    body = b""
    for name, value in parts:
        filename = "" if isinstance(value, str) else '; filename="a.png"'
        header = f'--b\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'
        data = value.encode() if isinstance(value, str) else value
        body += header.encode() + data + b"\r\n"
    return body + b"--b--\r\n"


def generate_photo(random: Random, format: str = "", size: int = 48) -> bytes:
    """Generate a valid image.

    Args:
        random: Random generator.
        format: PNG, JPEG or WEBP; empty: a random one.
        size: Side in pixels.

    Returns:
        Encoded image.
    """
    buffer, formats = io.BytesIO(), ["PNG", "JPEG", "WEBP"]
    pixels = random.integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
    image.save(buffer, format or formats[random.integers(3)])
    return buffer.getvalue()


def build_photo_request(data: bytes, *fields: tuple[str, bytes | str]) -> bytes:
    """Build a request for a LoRA from one photo.

    Args:
        data: Encoded photo.
        fields: Further fields of the form.

    Returns:
        Bytes of the request.
    """
    return build_request("/v1/loras", build_form(("photos", data), *fields))


def build_png_chunk(kind: bytes, body: bytes) -> bytes:
    """Build a chunk of a PNG file.

    Args:
        kind: Four letters.
        body: Bytes of the chunk.

    Returns:
        The chunk with length and checksum.
    """
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
