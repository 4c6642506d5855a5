"""Cut and altered image files: an image or one sentence, in bounded time and memory."""

import importlib.util
import io
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from hyperlora.data.images import read_image, read_image_size
from hyperlora.errors import InvalidImageError

NUM_FILES = 60
"""Damaged files of each format; 5,000 of each were tried once."""
MAX_SECONDS = 2.0
MAX_MEGABYTES = 500
STATUS = Path("/proc/self/status")
NUMBERS = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 25_000_000, 65_535, 20_000)
"""Sizes and offsets that decoders may trust."""


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def encode_heic(image: Image.Image) -> bytes:
    import pillow_heif

    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file)
    return file.getvalue()


def make_files() -> dict[str, list[bytes]]:
    """Small files of every format and of most kinds of pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    rgb = Image.fromarray(noise)
    wide = Image.fromarray(np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 80)
    palette, two_frames = rgb.quantize(8), {"save_all": True, "append_images": [rgb.rotate(180)]}
    exif = Image.Exif()
    exif[0x112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    extras: dict[str, Any] = {"exif": exif, "icc_profile": profile}
    compressions = ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits", "zstd")
    files = {
        "PNG": [
            encode(rgb, "PNG", **extras),
            encode(palette, "PNG", transparency=0),
            encode(wide, "PNG"),
            encode(rgb, "PNG", **two_frames),
        ],
        "JPEG": [
            encode(rgb, "JPEG", **extras),
            encode(rgb.convert("CMYK"), "JPEG"),
            encode(rgb, "JPEG", progressive=True),
            encode(rgb, "MPO", **two_frames),
        ],
        "WEBP": [
            encode(rgb, "WEBP", **extras),
            encode(rgb.convert("RGBA"), "WEBP", lossless=True),
            encode(rgb, "WEBP", duration=50, **two_frames),
        ],
        "GIF": [encode(palette, "GIF"), encode(rgb, "GIF", transparency=0, **two_frames)],
        "BMP": [encode(i, "BMP") for i in (rgb, palette, rgb.convert("1"), rgb.convert("RGBA"))],
        "TIFF": [encode(rgb, "TIFF", compression=name) for name in compressions]
        + [encode(i, "TIFF") for i in (rgb.convert("LAB"), palette, wide)]
        + [encode(rgb.convert("1"), "TIFF", compression="group4")],
        "JPEG 2000": [
            encode(rgb, "JPEG2000"),
            encode(rgb.convert("RGBA"), "JPEG2000", irreversible=True),
            encode(rgb.convert("L"), "JPEG2000", no_jp2=True),
        ],
        "AVIF": [encode(rgb, "AVIF", **extras), encode(rgb.convert("RGBA"), "AVIF")],
    }
    if importlib.util.find_spec("pillow_heif"):
        files["HEIC"] = [encode_heic(rgb), encode_heic(rgb.convert("RGBA"))]
    return files


FILES = make_files()


def damage(data: bytes, generator: random.Random) -> bytes:
    """Cut a file, or change bits, bytes and numbers, half of the time in its header alone."""
    if generator.random() < 0.25:
        return data[: generator.randrange(len(data))]
    damaged = bytearray(data)
    end = len(data) if generator.random() < 0.5 else min(len(data), 200)
    for _ in range(generator.choice((1, 1, 2, 4, 8, 32))):
        i, kind = generator.randrange(end), generator.random()
        if kind < 0.4:
            damaged[i] ^= 1 << generator.randrange(8)
        elif kind < 0.8:
            damaged[i] = generator.choice((0, 1, 64, 127, 128, 255, generator.randrange(256)))
        else:
            number = generator.choice(NUMBERS)
            both_orders = number.to_bytes(4, "big"), number.to_bytes(4, "little")
            damaged[i : i + 4] = generator.choice(both_orders)
    if generator.random() < 0.1:
        start = generator.randrange(len(damaged))
        del damaged[start : start + generator.randrange(1, 20)]
    return bytes(damaged)


def measure_peak_megabytes(function: Callable[[], Any]) -> float:
    """Measure by how much the peak of memory lies above the memory at the start; Linux only."""

    def read(key: str) -> int:
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))

    Path("/proc/self/clear_refs").write_text("5")
    start = read("VmRSS")
    function()
    return (read("VmHWM") - start) / 1024


def read_damaged_files(kind: str) -> None:
    generator = random.Random(kind)
    for _ in range(NUM_FILES):
        data = damage(generator.choice(FILES[kind]), generator)
        for read_fn in (read_image, read_image_size):
            start = time.process_time()
            message = ""
            try:
                result = read_fn(data)
            except InvalidImageError as error:
                message = str(error)
            assert "\n" not in message and len(message) < 400
            if not message and isinstance(result, Image.Image):
                assert (result.mode, result.info) == ("RGB", {})
                assert len(result.tobytes()) == 3 * result.width * result.height
            assert time.process_time() - start < MAX_SECONDS


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", sorted(FILES))
def test_damaged_files_give_an_image_or_one_sentence(kind: str) -> None:
    for data in FILES[kind]:
        assert read_image(data).size in ((32, 24), (24, 32))
    if not STATUS.is_file():
        read_damaged_files(kind)
        return
    assert measure_peak_megabytes(lambda: read_damaged_files(kind)) < MAX_MEGABYTES


@pytest.mark.skipif(not STATUS.is_file(), reason="measures memory as Linux tells it")
def test_largest_images_of_16_bits_are_read_in_little_memory() -> None:
    rows = np.arange(5000, dtype=np.uint16) * 13
    data = encode(Image.fromarray(np.broadcast_to(rows, (4998, 5000)).copy()), "PNG")
    images: list[Image.Image] = []
    start = time.process_time()
    assert measure_peak_megabytes(lambda: images.append(read_image(data))) < 400
    assert time.process_time() - start < MAX_SECONDS
    expected = (rows[None].astype(int) + 128) // 257
    assert np.array_equal(np.asarray(images[0])[[0, -1], :, 0], np.repeat(expected, 2, 0))
