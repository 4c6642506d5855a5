"""Parts of image files, counted before a decoder meets them.

A decoder goes over the whole image for every scan of a progressive JPEG, and Pillow calls Python
code for every chunk and every segment: small files may take hours.
"""

import re
import struct
from typing import Final

from hyperlora.errors import InvalidImageError

MAX_SCANS: Final = 100
"""Scans of a JPEG; encoders write about ten."""
MAX_SEGMENTS: Final = 2000
"""Segments of a JPEG, each up to 64 KiB."""
MAX_FILL_BYTES: Final = 1 << 16
"""Bytes of a JPEG that belong to no segment, and are read again and again."""
MAX_CHUNKS: Final = 20_000
"""Chunks of a PNG or WEBP; encoders write one for each 4 KiB at least."""
_LONGEST_FILL: Final = b"\xff" * MAX_FILL_BYTES
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN, _TEMPORARY = 0xD8, 0xD9, 0xDA, 0x01
_RESTARTS: Final = range(0xD0, 0xD8)
_HEADER_MARKER: Final = re.compile(rb"\xff[^\x00\xff]")
_SCAN_MARKER: Final = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""Entropy-coded data has a zero behind each 0xFF, and markers of restarts."""


def check_parts(data: bytes, format_name: str, source_name: str) -> None:
    """Check the numbers of parts of a file; see ``find_excess``.

    Args:
        data: The file.
        format_name: Its format, of ``IMAGE_FORMATS``.
        source_name: Its name in the message.

    Raises:
        InvalidImageError: It has too many.
    """
    if excess := find_excess(data, format_name):
        raise InvalidImageError(
            f"{source_name} has more than {excess}, which no usual program writes: export it again"
        )


def find_excess(data: bytes, format_name: str) -> str | None:
    """Find of which part a file has more than is read.

    Args:
        data: The file.
        format_name: Its format, of ``IMAGE_FORMATS``.

    Returns:
        The part and its limit, such as ``100 scans``; None if the file may be decoded.
    """
    if format_name == "JPEG" and data:
        return _find_jpeg_excess(data)
    if format_name == "PNG":
        return _find_chunk_excess(data, 8, ">I4x", 12)
    if format_name == "WEBP":
        return _find_chunk_excess(data, 12, "<4xI", 8)
    return None


def _find_jpeg_excess(data: bytes) -> str | None:
    """Go through the segments and the scans up to the end of the image; see ``find_excess``."""
    num_scans = num_segments = num_fill_bytes = 0
    position, pattern = 2, _HEADER_MARKER
    while True:
        match = pattern.search(data, position)
        end = match.end() if match else len(data)
        if pattern is _HEADER_MARKER:
            num_fill_bytes += end - 2 - position
        elif data.find(_LONGEST_FILL, position, end) >= 0:
            num_fill_bytes += len(_LONGEST_FILL)
        if num_fill_bytes >= MAX_FILL_BYTES:
            return f"{MAX_FILL_BYTES >> 10} KiB between its segments"
        marker = data[end - 1]
        if match is None or marker == _END_OF_IMAGE:
            return None
        num_segments += 1
        num_scans += marker == _START_OF_SCAN
        if num_scans > MAX_SCANS:
            return f"{MAX_SCANS} scans"
        if num_segments > MAX_SEGMENTS:
            return f"{MAX_SEGMENTS} segments"
        position = end
        if marker not in (_START_OF_IMAGE, _TEMPORARY, *_RESTARTS):
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
            pattern = _SCAN_MARKER if marker == _START_OF_SCAN else _HEADER_MARKER


def _find_chunk_excess(
    data: bytes, position: int, head_format: str, num_overhead_bytes: int
) -> str | None:
    """Go through chunks, whose heads of 8 bytes tell the size of the content.

    Args:
        data: The file.
        position: The place of the first chunk.
        head_format: Where the size stands, as ``struct`` reads it.
        num_overhead_bytes: Bytes of a chunk besides its content.

    Returns:
        See ``find_excess``.
    """
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return None
        (size,) = struct.unpack_from(head_format, data, position)
        position += size + num_overhead_bytes
        position += position % 2 if head_format.startswith("<") else 0  # WEBP pads to even places
    return f"{MAX_CHUNKS} chunks"
