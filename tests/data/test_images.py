"""Images of every format and of none, read safely."""

import hashlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from hyperlora.data import images
from hyperlora.data.images import compute_sha256, list_image_files, read_image, to_image, to_tensor
from hyperlora.errors import InvalidImageError


def encode_image(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_photo(width: int = 24, height: int = 16) -> Image.Image:
    """Smooth, so that JPEG keeps it: dark to bright from the left, red to blue from the top."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([255 - y, x, y], -1).astype(np.uint8))


def make_png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_empty_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + make_png_chunk(b"IHDR", header)
        + make_png_chunk(b"IDAT", zlib.compress(b""))
        + make_png_chunk(b"IEND", b"")
    )


def is_close(a: Image.Image, b: Image.Image, tolerance: int) -> bool:
    assert (a.mode, a.size) == (b.mode, b.size)
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) <= tolerance


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100, "subsampling": 0})],
)
def test_read_image_detects_formats_by_content(
    kind: str, options: dict[str, object], tmp_path: Path
) -> None:
    data = encode_image(make_photo(), kind, **options)
    path = tmp_path / "named.txt"
    path.write_bytes(data)
    for source in (data, path, str(path), Image.open(path)):
        assert is_close(read_image(source), make_photo(), 6 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_applies_exif_orientation(orientation: int) -> None:
    transforms = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: np.swapaxes(a, 0, 1),
        6: lambda a: np.rot90(a, 3),
        7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
        8: np.rot90,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = transforms[orientation](np.asarray(make_photo()))
    assert np.array_equal(np.asarray(read_image(encode_image(make_photo(), exif=exif))), expected)


def test_read_image_ignores_malformed_exif() -> None:
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0nonsense"):
        assert is_close(
            read_image(encode_image(make_photo(), "JPEG", quality=100, subsampling=0, exif=exif)),
            make_photo(),
            6,
        )


def test_read_image_drops_metadata() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    exif.get_ifd(0x8825)[1] = "N"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encode_image(make_photo(), kind, exif=exif, icc_profile=profile)
        image = read_image(data)
        assert image.info == {}
        assert not dict(image.getexif())
        assert b"maker" in data
        assert b"maker" not in encode_image(image, kind)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_read_image_composites_transparency_over_white(kind: str) -> None:
    image = Image.new("RGBA", (3, 1), (200, 0, 100, 255))
    image.putpixel((1, 0), (200, 0, 100, 0))
    image.putpixel((2, 0), (200, 0, 100, 51))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = np.asarray(read_image(encode_image(image, kind, **options)))[0]
    assert pixels.tolist() == [[200, 0, 100], [255, 255, 255], [244, 204, 224]]


def test_read_image_converts_gray_palette_and_bilevel() -> None:
    gray = Image.fromarray(np.array([[10, 200]], np.uint8))
    assert np.asarray(read_image(encode_image(gray))).tolist() == [[[10] * 3, [200] * 3]]
    assert np.asarray(read_image(encode_image(gray, transparency=10))).tolist() == [
        [[255] * 3, [200] * 3]
    ]
    both = Image.merge("LA", (gray, Image.fromarray(np.array([[255, 0]], np.uint8))))
    assert np.asarray(read_image(encode_image(both))).tolist() == [[[10] * 3, [255] * 3]]
    assert np.asarray(read_image(both.convert("La"))).tolist() == [[[10] * 3, [255] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert np.asarray(read_image(encode_image(palette))).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert np.asarray(read_image(encode_image(palette, transparency=b"\xff\0"))).tolist() == [
        [[255, 0, 0], [255] * 3]
    ]
    bits = Image.new("1", (1, 1), 1)
    assert np.asarray(read_image(encode_image(bits))).tolist() == [[[255] * 3]]
    color_keyed = encode_image(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))
    assert np.asarray(read_image(color_keyed)).tolist() == [[[255] * 3]]


def test_read_image_scales_16_bits() -> None:
    wide = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255]
    assert np.asarray(read_image(encode_image(Image.fromarray(wide))))[0, :, 0].tolist() == expected
    assert (
        np.asarray(read_image(Image.fromarray(wide.astype(np.int32))))[0, :, 2].tolist() == expected
    )
    big_endian = Image.frombytes("I;16B", (6, 1), wide.astype(">u2").tobytes())
    assert np.asarray(read_image(big_endian))[0, :, 1].tolist() == expected
    data = encode_image(Image.fromarray(wide))
    keyed = data[:33] + make_png_chunk(b"tRNS", struct.pack(">H", 32768)) + data[33:]
    assert np.asarray(read_image(keyed))[0, :, 0].tolist() == [0, 0, 1, 1, 255, 255]


def test_read_image_converts_cmyk() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert is_close(
        read_image(encode_image(red, "JPEG", quality=100)),
        Image.new("RGB", (16, 16), (255, 0, 0)),
        3,
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_read_image_returns_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encode_image(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert is_close(read_image(data), frames[0], 0)


def test_read_image_keeps_pil_image_unchanged() -> None:
    image = make_photo()
    image.info["comment"] = "mine"
    read = read_image(image)
    read.putpixel((0, 0), (1, 2, 3))
    assert image.info == {"comment": "mine"}
    assert is_close(image, make_photo(), 0)


@pytest.mark.parametrize("size", [(20_000, 20_000), (5001, 5000), (2**31 - 1, 2**31 - 1)])
def test_read_image_refuses_size_in_header(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(
        InvalidImageError,
        match=rf"is {size[0]}×{size[1]}, at most 25 megapixels are read: scale it down",
    ):
        read_image(make_empty_png(*size))
    assert not recwarn.list


def test_read_image_refuses_large_images_of_all_formats() -> None:
    wide = Image.new("L", (6000, 5000))
    for source in (
        wide,
        encode_image(wide, "JPEG"),
        encode_image(wide, "WEBP", quality=1, method=0),
    ):
        with pytest.raises(InvalidImageError, match="6000×5000, at most 25 megapixels"):
            read_image(source)


@pytest.mark.parametrize("side", [9_600, 16_383, 65_535])
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_read_image_refuses_huge_webp_canvas(side: int, action: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = bytearray(encode_image(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    data[24:30] = (side - 1).to_bytes(3, "little") * 2
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(
            InvalidImageError, match="at most 25 megapixels are read: scale it down"
        ):
            read_image(bytes(data))


def test_read_image_refuses_large_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 1_000_000)
    path = tmp_path / "large.png"
    path.write_bytes(encode_image(make_photo()) + bytes(1_000_000))
    for source in (path, path.read_bytes()):
        with pytest.raises(InvalidImageError, match="larger than the 1 MB"):
            read_image(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_read_image_names_truncated_file(kind: str, tmp_path: Path) -> None:
    data_bytes = encode_image(make_photo(200, 200), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    for fraction in (0.1, 0.5, 0.9):
        path.write_bytes(data_bytes[: int(len(data_bytes) * fraction)])
        with pytest.raises(
            InvalidImageError,
            match=r"cut.*is damaged or cut off \(.+\), a whole image was expected",
        ) as error_info:
            read_image(path)
        assert "\n" not in str(error_info.value)


@pytest.mark.parametrize(
    "data", [b"", b"<svg/>", b"GIF89a" + bytes(40), b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"]
)
def test_read_image_refuses_other_content(data: bytes) -> None:
    with pytest.raises(InvalidImageError, match=r"PNG, JPEG or WEBP|whole image"):
        read_image(data)


@pytest.mark.parametrize("kind", ["PCX", "TGA", "ICO", "PPM"])
def test_read_image_refuses_other_formats_of_pil(kind: str) -> None:
    with pytest.raises(
        InvalidImageError,
        match="another kind of file, a PNG, JPEG or WEBP image was expected: save it as",
    ):
        read_image(encode_image(make_photo(), kind))


def test_read_image_refuses_paths_of_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    for name in ("missing.png", "pipe.png", "dangling.png", "nul\0.png"):
        with pytest.raises(InvalidImageError, match="there is no file"):
            read_image(tmp_path / name)
    with pytest.raises(InvalidImageError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(InvalidImageError, match="cannot be read"):
        read_image(tmp_path / ("x" * 300))
    with pytest.raises(InvalidImageError, match=r"cannot be read|there is no file"):
        read_image("/proc/self/mem")


@pytest.mark.parametrize(
    "image",
    [
        Image.new("F", (2, 2)),
        Image.new("I", (2, 2), 70_000),
        Image.new("I", (2, 2), -1),
        Image.new("RGB", (0, 5)),
    ],
    ids=["float", "over 16 bits", "negative", "no pixels"],
)
def test_read_image_refuses_modes_without_8_bit_range(image: Image.Image) -> None:
    with pytest.raises(InvalidImageError, match="expected"):
        read_image(image)


def test_read_image_says_that_a_tiff_of_float_colors_is_whole() -> None:
    buffer = io.BytesIO()
    make_photo().save(buffer, "TIFF", tiffinfo={339: (3, 3, 3)})  # SampleFormat: floating point
    with pytest.raises(InvalidImageError, match="kind of pixels that is not read") as error:
        read_image(buffer.getvalue())
    assert "damaged" not in str(error.value)


def check_read_or_refuse(data: bytes) -> None:
    try:
        mode, message = read_image(data).mode, ""
    except InvalidImageError as error:
        mode, message = "RGB", str(error)
    assert mode == "RGB"
    assert "\n" not in message


@given(
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x10\0\0\0WEBPVP8X"]),
    st.binary(max_size=200),
)
@settings(max_examples=200, deadline=None)
def test_read_image_survives_random_bytes(start: bytes, rest: bytes) -> None:
    check_read_or_refuse(start + rest)


def make_images_with_metadata() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    exif.get_ifd(0x8825)[1] = "N"
    wide = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    return {
        "jpeg": encode_image(make_photo(), "JPEG", exif=exif),
        "jpeg progressive": encode_image(make_photo().convert("CMYK"), "JPEG", progressive=True),
        "png": encode_image(make_photo().convert("RGBA"), exif=exif),
        "png palette": encode_image(make_photo().quantize(8), transparency=1),
        "png 16": encode_image(wide),
        "webp": encode_image(make_photo().convert("RGBA"), "WEBP", exif=exif),
    }


@given(st.sampled_from(list(make_images_with_metadata().values())), st.data())
@settings(max_examples=300, deadline=None)
def test_read_image_survives_mutated_files(data_bytes: bytes, data: st.DataObject) -> None:
    mutated = bytearray(data_bytes)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(["set", "insert", "remove", "cut"])):
            case "set":
                mutated[at] = data.draw(st.integers(0, 255))
            case "insert":
                mutated[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "remove":
                del mutated[at : at + 4]
            case "cut":
                del mutated[at + 1 :]
        mutated = mutated or bytearray(b"\0")
    check_read_or_refuse(bytes(mutated))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_read_image_survives_mutated_png_chunks(data: st.DataObject) -> None:
    """A wrong checksum hides what follows it, so every mutated chunk gets a right one."""
    data_bytes = make_images_with_metadata()[
        data.draw(st.sampled_from(["png", "png palette", "png 16"]))
    ]
    out, at = data_bytes[:8], 8
    while at < len(data_bytes):
        (length,), kind = struct.unpack_from(">I", data_bytes, at), data_bytes[at + 4 : at + 8]
        content = bytearray(data_bytes[at + 8 : at + 8 + length])
        if content and data.draw(st.booleans()):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        kind = data.draw(
            st.sampled_from(
                [kind, kind, b"zTXt", b"iCCP", b"eXIf", b"tRNS", b"acTL", b"fcTL", b"pHYs"]
            )
        )
        out += make_png_chunk(kind, bytes(content)) * data.draw(st.integers(1, 2))
        at += length + 12
    check_read_or_refuse(out)


def test_list_image_files_sorts_and_skips_hidden_and_outside(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "folder.png").mkdir(parents=True)
    outside.mkdir()
    for path in (
        inside / "b.PNG",
        inside / "a.jpeg",
        inside / ".hidden.png",
        inside / "c.txt",
        outside / "x.png",
    ):
        path.write_bytes(encode_image(make_photo()))
    (inside / "d.webp").symlink_to(outside / "x.png")
    (inside / "e.png").symlink_to(inside / "b.PNG")
    assert [p.name for p in list_image_files(inside)] == ["a.jpeg", "b.PNG", "e.png"]
    assert [p.name for p in list_image_files(str(inside), root_dir=tmp_path)] == [
        "a.jpeg",
        "b.PNG",
        "d.webp",
        "e.png",
    ]


def test_list_image_files_names_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        InvalidImageError,
        match=rf"{tmp_path.name}' holds no image, such as PNG, JPEG, WEBP or HEIC",
    ):
        list_image_files(tmp_path)
    with pytest.raises(InvalidImageError, match="there is no folder"):
        list_image_files(tmp_path / "missing")
    with pytest.raises(InvalidImageError, match="is a file, a folder of images was expected"):
        list_image_files(tmp_path / "notes.txt")
    with pytest.raises(InvalidImageError, match="cannot be read"):
        list_image_files("nul\0")


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24))
@settings(max_examples=50, deadline=None)
def test_to_tensor_returns_square_in_unit_range(width: int, height: int, size: int) -> None:
    tensor = to_tensor(make_photo(width, height), size)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (
        (3, size, size),
        torch.float32,
        True,
    )
    assert 0 <= tensor.min() <= tensor.max() <= 1


def test_to_tensor_crops_center_and_antialiases() -> None:
    wide = Image.new("RGB", (30, 10), "blue")
    wide.paste("red", (10, 0, 20, 10))
    assert to_tensor(wide, 10)[:, 5].T.tolist() == [[1, 0, 0]] * 10
    stripes = Image.fromarray(
        (np.indices((64, 64))[1] % 2 * 255).astype(np.uint8)
    )  # also: not RGB yet
    assert (to_tensor(stripes, 8) - 0.5).abs().max() < 0.02


@given(st.integers(0, 2**32 - 1), st.integers(1, 16))
@settings(max_examples=50, deadline=None)
def test_to_image_inverts_to_tensor(seed: int, size: int) -> None:
    square = Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    )
    assert is_close(to_image(to_tensor(square, size)), square, 0)


def test_to_image_clamps_bfloat16_with_gradient() -> None:
    tensor = torch.tensor([-0.5, 0.5, 1.5], dtype=torch.bfloat16, requires_grad=True).view(3, 1, 1)
    assert to_image(tensor).getpixel((0, 0)) == (0, 128, 255)


def test_compute_sha256_hashes_file_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert compute_sha256(path) == compute_sha256(b"abc") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(InvalidImageError, match="there is no file"):
        compute_sha256(tmp_path / "b")
