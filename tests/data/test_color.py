"""Colors of embedded profiles, whatever the format and the kind of pixels."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from hyperlora.data.images import read_image, to_tensor

SKIN = (214, 148, 96)
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def pack_numbers(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def make_profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2, written by hand (ICC.1:2001-04)."""
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 79, **tags}
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + pack_numbers(0.9642, 1, 0.8249)
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        padded = value + b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", start + len(body), len(padded))
        body += padded
    header = struct.pack(
        ">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, b"mntr", space, b"XYZ "
    )
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    header += pack_numbers(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def make_curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def make_rgb_profile(primaries: tuple[tuple[float, ...], ...], gamma: float = 2.2) -> bytes:
    tags = {}
    for name, xyz in zip((b"r", b"g", b"b"), primaries, strict=True):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + pack_numbers(*xyz)
        tags[name + b"TRC"] = make_curve(gamma)
    return make_profile(b"RGB ", tags)


def encode(image: Image.Image, kind: str, profile: bytes | None, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, icc_profile=profile, **options)
    return file.getvalue()


def make_wide_image(profile: bytes, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """The color ``SKIN`` of sRGB, in the space of a profile."""
    source, target = ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.profileToProfile(Image.new("RGB", size, SKIN), source, target)


def find_largest_error(image: Image.Image, color: tuple[int, ...]) -> int:
    return int(np.abs(np.asarray(image, int) - np.array(color)).max())


@pytest.mark.parametrize("primaries", [DISPLAY_P3, ADOBE_RGB], ids=["Display P3", "Adobe RGB"])
@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 1),
        ("TIFF", {}, 1),
        ("WEBP", {"lossless": True}, 1),
        ("JPEG", {"quality": 95, "subsampling": 0}, 2),
        ("MPO", {"quality": 95, "subsampling": 0}, 2),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 2),
    ],
)
def test_profiles_are_converted_to_srgb(
    primaries: tuple[tuple[float, ...], ...], kind: str, options: dict[str, object], tolerance: int
) -> None:
    profile = make_rgb_profile(primaries)
    wide = make_wide_image(profile)
    assert find_largest_error(wide, SKIN) > 8
    if kind == "MPO":
        options = {**options, "save_all": True, "append_images": [Image.new("RGB", wide.size)]}
    data = encode(wide, kind, profile, **options)
    image = read_image(data)
    assert find_largest_error(image, SKIN) <= tolerance
    assert image.info == {}
    opened = Image.open(io.BytesIO(data))
    assert find_largest_error(read_image(opened), SKIN) <= tolerance
    pixels = to_tensor(Image.open(io.BytesIO(data)), 8)  # also where an image is not read before
    assert (pixels * 255 - pixels.new_tensor(SKIN)[:, None, None]).abs().max() <= tolerance


def test_profile_precedes_orientation_and_alpha() -> None:
    profile = make_rgb_profile(DISPLAY_P3)
    wide = make_wide_image(profile).convert("RGBA")
    wide.putalpha(Image.linear_gradient("L").resize(wide.size))
    exif = Image.Exif()
    exif[0x0112] = 8
    image = read_image(encode(wide, "PNG", profile, exif=exif))
    assert image.size == (24, 40)
    alpha = np.asarray(wide.getchannel("A").transpose(Image.Transpose.ROTATE_90), float) / 255
    expected = 255 - alpha[..., None] * (255 - np.array(SKIN))  # over white, in sRGB
    assert np.abs(np.asarray(image) - expected).max() <= 1.5


def test_palette_and_its_transparency_keep_their_colors() -> None:
    profile = make_rgb_profile(ADOBE_RGB)
    palette = make_wide_image(profile).quantize(2)
    image = Image.new("P", palette.size, 1)
    image.putpalette(
        [
            *palette.getpixel((0, 0)).to_bytes(1, "big") * 3,
            *make_wide_image(profile).getpixel((0, 0)),
        ]
    )
    image.paste(0, (0, 0, 10, 24))
    read = read_image(encode(image, "PNG", profile, transparency=0))
    assert read.getpixel((3, 3)) == (255, 255, 255)
    assert find_largest_error(read.crop((10, 0, 40, 24)), SKIN) <= 1


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.6])
def test_gray_profiles_are_converted(gamma: float) -> None:
    profile = make_profile(b"GRAY", {b"kTRC": make_curve(gamma)})
    level = 90
    linear = (level / 255) ** gamma
    srgb = 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
    expected = (round(255 * srgb),) * 3
    gray = Image.new("L", (30, 20), level)
    for kind in ("PNG", "JPEG", "TIFF"):
        assert find_largest_error(read_image(encode(gray, kind, profile)), expected) <= 2
    gray_16_bit = Image.fromarray(np.full((20, 30), level * 257, np.uint16))
    assert find_largest_error(read_image(encode(gray_16_bit, "PNG", profile)), expected) <= 2
    with_alpha = Image.merge("LA", (gray, Image.new("L", gray.size, 255)))
    assert find_largest_error(read_image(encode(with_alpha, "PNG", profile)), expected) <= 2


def make_cmyk_profile() -> bytes:
    """A press that prints all inks gray: L* = 100 (1 - k) (1 - (c + m + y) / 3), as a lut8."""
    corners = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    lab = [(round(255 * (1 - k) * (1 - (c + m + y) / 3)), 128, 128) for c, m, y, k in corners]
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + pack_numbers(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += ramp * 4 + bytes(v for color in lab for v in color) + ramp * 3
    profile = make_profile(b"CMYK", {b"A2B0": table})
    return profile[:12] + b"prtr" + profile[16:20] + b"Lab " + profile[24:]


@pytest.mark.parametrize("ink", [(0, 255, 0, 0), (255, 0, 0, 0), (0, 0, 0, 85), (0, 0, 0, 0)])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_profiles_are_converted(kind: str, ink: tuple[int, int, int, int]) -> None:
    lightness = 100 * (1 - ink[3] / 255) * (1 - sum(ink[:3]) / 255 / 3)
    linear = ((lightness + 16) / 116) ** 3
    expected = round(255 * (1.055 * linear ** (1 / 2.4) - 0.055))
    data = encode(Image.new("CMYK", (24, 16), ink), kind, make_cmyk_profile(), quality=100)
    assert find_largest_error(read_image(data), (expected,) * 3) <= 3


def test_profile_of_other_pixels_changes_nothing() -> None:
    profile = make_rgb_profile(DISPLAY_P3)
    gray_profile = make_profile(b"GRAY", {b"kTRC": make_curve(1.0)})
    gray, cmyk = Image.new("L", (8, 8), 90), Image.new("CMYK", (16, 16), (10, 120, 150, 20))
    assert find_largest_error(read_image(encode(gray, "PNG", profile)), (90,) * 3) == 0
    plain = read_image(encode(cmyk, "JPEG", None, quality=100))
    assert read_image(encode(cmyk, "JPEG", profile, quality=100)).tobytes() == plain.tobytes()
    rgb = Image.new("RGB", (8, 8), SKIN)
    assert find_largest_error(read_image(encode(rgb, "PNG", gray_profile)), SKIN) == 0


@pytest.mark.parametrize(
    "profile",
    [b"x", b"\0" * 128, make_rgb_profile(DISPLAY_P3)[:200], b"\xff" * 5000],
    ids=["short", "zeros", "cut", "noise"],
)
def test_broken_profile_leaves_the_image_as_it_is(profile: bytes) -> None:
    image = Image.new("RGB", (16, 8), SKIN)
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert find_largest_error(read_image(encode(image, kind, profile, **options)), SKIN) == 0


def test_srgb_profile_is_exactly_no_change() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    read = read_image(encode(Image.fromarray(pixels), "PNG", profile))
    assert np.array_equal(np.asarray(read), pixels)


def test_lab_pixels_are_converted() -> None:
    lab = ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(
        Image.new("RGB", (9, 7), SKIN), ImageCms.createProfile("sRGB"), lab, outputMode="LAB"
    )
    assert find_largest_error(read_image(encode(image, "TIFF", None)), SKIN) <= 3
