"""Files of very many small parts are refused before they are decoded."""

import io
import struct
import zlib
from time import process_time

import numpy as np
import pytest
from PIL import Image

from hyperlora.data.image_limits import MAX_CHUNKS, MAX_SCANS, MAX_SEGMENTS, find_excess
from hyperlora.data.images import read_image, read_image_size
from hyperlora.errors import InvalidImageError


def make_image(format: str, size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    """Make a file of noise."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(buffer, format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def make_progressive(num_scans: int, between: bytes = b"") -> bytes:
    """Make a progressive JPEG whose last scan is there several times."""
    data = make_image("JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    num_others = data.count(b"\xff\xda")
    return data[:-2] + (between + last_scan) * (num_scans - num_others) + data[-2:]


def make_chunk(kind: bytes, content: bytes = b"") -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def insert(data: bytes, place: int, part: bytes, count: int) -> bytes:
    return data[:place] + part * count + data[place:]


JPEG = make_image("JPEG")
PNG = make_image("PNG")
COMMENT = b"\xff\xfe\0\x04ab"
EXCESSIVE_FILES = {
    "scans": (make_progressive(MAX_SCANS + 1), "100 scans"),
    "scans after fill bytes": (make_progressive(MAX_SCANS + 1, b"\xff" * 5), "100 scans"),
    "scans after a segment that ends in 0xFF": (
        make_progressive(MAX_SCANS + 1, b"\xff\xfe\0\3\xff"),
        "100 scans",
    ),
    "scans after a segment without content": (
        make_progressive(MAX_SCANS + 1, b"\xff\xfe\0\0"),
        "100 scans",
    ),
    "comments": (insert(JPEG, 2, COMMENT, MAX_SEGMENTS), "2000 segments"),
    "restarts": (insert(JPEG, 20, b"\xff\xd0", MAX_SEGMENTS), "2000 segments"),
    "fill bytes": (insert(JPEG, 2, b"\xff", 70_000), "64 KiB between"),
    "fill bytes in a scan": (insert(JPEG, len(JPEG) - 2, b"\xff", 70_000), "64 KiB between"),
    "fill bytes at the end": (JPEG[:-2] + b"\xff" * 70_000, "64 KiB between"),
    "junk": (insert(JPEG, 20, b"\0", 70_000), "64 KiB between"),
    "zeros behind 0xFF": (insert(JPEG, 2, b"\xff\0", 35_000), "64 KiB between"),
    "chunks": (insert(PNG, 33, make_chunk(b"aaAa"), MAX_CHUNKS), "20000 chunks"),
    "empty pixels": (insert(PNG, 33, make_chunk(b"IDAT"), MAX_CHUNKS), "20000 chunks"),
    "last chunks": (insert(PNG, len(PNG) - 12, make_chunk(b"aaAa"), MAX_CHUNKS), "20000 chunks"),
    "WEBP": (make_image("WEBP") + b"abcd\1\0\0\0x\0" * MAX_CHUNKS, "20000 chunks"),
}


@pytest.mark.parametrize("case", EXCESSIVE_FILES)
def test_read_image_refuses_many_parts(case: str) -> None:
    data, part = EXCESSIVE_FILES[case]
    for read_fn in (read_image, read_image_size):
        with pytest.raises(InvalidImageError, match=f"has more than {part}"):
            read_fn(data)


USUAL_FILES = {
    "progressive": make_progressive(MAX_SCANS - 10),
    "restarts": make_image("JPEG", (800, 800), restart_marker_blocks=1),
    "large": make_image("JPEG", (900, 700), quality=100, subsampling=0),
    "comments": insert(JPEG, 2, COMMENT, 900),
    "scans of a video behind the image": JPEG + b"\xff\xda\xff\xff" * 5000,
    "a thumbnail of many scans": insert(JPEG, 2, b"\xff\xe5\xea\x62" + b"\xff\xda" * 30_000, 9),
    "fill bytes": insert(JPEG, 2, b"\xff", 999),
    "small chunks": insert(PNG, 33, make_chunk(b"aaAa"), 5000),
    "animation": make_image("PNG", save_all=True, append_images=[Image.new("RGB", (40, 30))] * 9),
    "WEBP": make_image("WEBP", save_all=True, append_images=[Image.new("RGB", (40, 30))] * 9),
}


@pytest.mark.parametrize("case", USUAL_FILES)
def test_read_image_reads_usual_numbers_of_parts(case: str) -> None:
    assert read_image(USUAL_FILES[case]).size == read_image_size(USUAL_FILES[case])


@pytest.mark.parametrize("unit", [b"\xff", b"\xff\0", b"\xff\xd0", b"\0", b"\xff\xff\0"])
def test_find_excess_takes_linear_time(unit: bytes) -> None:
    start_s = process_time()
    for place in (2, len(JPEG) - 2):
        find_excess(insert(JPEG, place, unit, 1 << 20), "JPEG")
    assert process_time() - start_s < 1.5  # 0.1 s; quadratic time would be hours


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 5, 9, 21, 33, 40])
def test_find_excess_takes_files_that_are_cut_off(cut: int) -> None:
    for format in ("JPEG", "PNG", "WEBP"):
        assert find_excess(make_image(format)[:cut], format) is None
