"""Photos as telephones, cameras and programs write them: read, or refused by their kind."""

import importlib.util
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperlora.data import image_formats
from hyperlora.data.image_formats import UPLOAD_FORMATS, detect_format
from hyperlora.data.images import read_image, read_image_size
from hyperlora.errors import InvalidImageError

FORMATS = {
    "PNG": (".png", {}),
    "JPEG": (".jfif", {"quality": 95}),
    "MPO": (".mpo", {"quality": 95}),
    "WEBP": (".WebP", {"lossless": True}),
    "GIF": (".GIF", {}),
    "BMP": (".bmp", {}),
    "TIFF": (".Tiff", {}),
    "JPEG2000": (".jp2", {"irreversible": False}),
    "AVIF": (".avif", {"quality": 95}),
}
HEIC_START = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf"


def make_photo(width: int = 26, height: int = 18) -> Image.Image:
    """Smooth: dark to bright from the left, red to blue from the top."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([255 - y, x, y], -1).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def compute_mean_error(first: Image.Image, second: Image.Image) -> float:
    assert (first.mode, first.size) == (second.mode, second.size)
    return float(np.abs(np.asarray(first, int) - np.asarray(second, int)).mean())


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_read_under_any_name(kind: str, tmp_path: Path) -> None:
    suffix, options = FORMATS[kind]
    data = encode(make_photo(), kind, **options)
    for name in (f"a photo ü 照片{suffix}", "wrong.png", "no suffix"):
        (tmp_path / name).write_bytes(data)
        image = read_image(tmp_path / name)
        assert compute_mean_error(image, make_photo()) < 8, name
    assert read_image_size(data) == (26, 18)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_orientation_is_applied_once_in_every_format(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = read_image(encode(make_photo(), "PNG", exif=exif))
    data = encode(make_photo(), kind, exif=exif)
    assert compute_mean_error(read_image(data), expected) < 8
    assert read_image_size(data) == expected.size


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "AVIF", "PNG", "WEBP"])
def test_first_frame_is_read(kind: str) -> None:
    frames = [make_photo(), make_photo().rotate(180)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert compute_mean_error(read_image(data), frames[0]) < 10


def test_transparency_of_gif_is_white() -> None:
    image = Image.new("P", (6, 4), 1)
    image.putpalette([10, 20, 30, 200, 40, 60])
    image.paste(0, (0, 0, 3, 4))
    read = read_image(encode(image, "GIF", transparency=0))
    assert [read.getpixel((x, 1)) for x in (0, 5)] == [(255, 255, 255), (200, 40, 60)]


@pytest.mark.skipif(not importlib.util.find_spec("pillow_heif"), reason="needs the extra heif")
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_heic_is_read_upright(orientation: int, tmp_path: Path) -> None:
    import pillow_heif

    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = make_photo(64, 48)
    heif = pillow_heif.from_pillow(photo)
    heif.save(tmp_path / "x.HEIC", quality=95, exif=exif.tobytes())
    image = read_image(tmp_path / "x.HEIC")
    expected = read_image(encode(photo, "PNG", exif=exif))
    assert compute_mean_error(image, expected) < 8
    assert read_image_size((tmp_path / "x.HEIC").read_bytes()) == expected.size
    with pytest.raises(InvalidImageError, match=r"is a HEIC image, a PNG, JPEG or WEBP image was"):
        read_image((tmp_path / "x.HEIC").read_bytes(), UPLOAD_FORMATS)


def test_formats_without_decoder_name_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = {**image_formats._DECODERS, "HEIC": ("no_such_module", "x")}
    monkeypatch.setattr(image_formats, "_DECODERS", missing)
    (tmp_path / "IMG_1.HEIC").write_bytes(HEIC_START + bytes(50))
    with pytest.raises(
        InvalidImageError, match=r"IMG_1\.HEIC' is a HEIC image, .* pip install 'hyperlora\[heif\]'"
    ):
        read_image(tmp_path / "IMG_1.HEIC")


def make_raw_tiff(order: str, tags: dict[int, int]) -> bytes:
    """A TIFF of one 2×2 image, with further tags of one number."""
    tags = {256: 2, 257: 2, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: 4, **tags}
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 12)
    entries = b"".join(struct.pack(f"{order}HHII", t, 4, 1, v) for t, v in sorted(tags.items()))
    return header + bytes(4) + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tags", [{254: 1}, {262: 32803}, {50706: 4}], ids=["NEF", "CFA", "DNG"])
def test_raw_files_are_no_tiff_of_their_thumbnail(order: str, tags: dict[int, int]) -> None:
    assert detect_format(make_raw_tiff(order, {})) == "TIFF"
    with pytest.raises(InvalidImageError, match=r"a camera RAW file, .* export it as JPEG"):
        read_image(make_raw_tiff(order, tags))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"II*\0\x10\0\0\0CR\x02\0", "camera RAW"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "camera RAW"),
        (b"FUJIFILMCCD-RAW 0201", "camera RAW"),
        (HEIC_START, "HEIC"),
        (b"\0\0\0\x20ftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0", "video"),
        (b"\xff\x0a\xff", "JPEG XL"),
        (b"%PDF-1.7", "PDF"),
        (b'<?xml version="1.0"?>\n<!-- x --><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"\n<!DOCTYPE html><html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\0\5\x16\7\0\2\0\0", "macOS resource"),
        (b"8BPS\0\1", "Photoshop"),
        (b"hello", ""),
        (b"", ""),
    ],
)
def test_other_files_are_named(data: bytes, kind: str) -> None:
    assert detect_format(data) == kind
    with pytest.raises(InvalidImageError) as error_info:
        read_image(data)
    message = str(error_info.value)
    assert "\n" not in message
    assert kind in message or kind in ("HEIC", "AVIF")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "JPEG2000", "AVIF"])
def test_uploads_are_of_few_formats_and_name_the_others(kind: str) -> None:
    data = encode(make_photo(), kind)
    name = kind.replace("JPEG2000", "JPEG 2000")
    with pytest.raises(InvalidImageError, match=rf"is an? {name} image, a PNG, JPEG or WEBP image"):
        read_image(data, UPLOAD_FORMATS)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "JPEG2000", "AVIF"])
def test_damaged_files_of_all_formats_are_one_sentence(kind: str) -> None:
    data = encode(make_photo(200, 150), kind)
    with pytest.raises(InvalidImageError, match="is damaged or cut off") as error_info:
        read_image(data[:30])
    assert "\n" not in str(error_info.value)
    with pytest.raises(InvalidImageError, match="at most 25 megapixels"):
        read_image(encode(Image.new("L", (6000, 5000)), kind))
