"""Colors: images with an embedded ICC profile are converted to sRGB, the space of all models.

The intent is relative colorimetric, with black point compensation. A profile that is broken, or
is for another kind of pixels, changes nothing. Colors without a profile count as sRGB: the chunks
gAMA, cHRM and cICP of PNG, the color codes (nclx) of AVIF and HEIC and HDR gain maps are not used.
"""

import io
from functools import lru_cache
from typing import Final, cast

from PIL import Image, ImageCms

from hyperlora.errors import InvalidImageError

_SPACE_BY_MODE: Final = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}
"""Color space of a profile that fits pixels of a mode."""
_MAX_IDENTITY_ERROR: Final = 1
"""Levels of 255 below which a profile counts as sRGB, whatever its name is."""
_GRAY_BY_16_BITS: Final = [(value + 128) // 257 for value in range(1 << 16)]
"""Gray of 8 bits by that of 16."""


def convert_to_srgb(image: Image.Image) -> Image.Image:
    """Convert the colors of an image by its embedded profile.

    Args:
        image: An image of 8 bits per channel, loaded; its profile is ``info["icc_profile"]``.

    Returns:
        The image in sRGB: RGB, or RGBA if it had transparency, whose alpha is kept. The same
        image if it has no profile, or one that does not fit.
    """
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    if not isinstance(profile, bytes) or not profile:
        return image
    alpha = None
    if image.has_transparency_data:
        image_with_alpha = image.convert("LA" if image.mode in ("L", "LA", "La") else "RGBA")
        alpha = image_with_alpha.getchannel("A")
        colors = image_with_alpha.convert(image_with_alpha.mode.removesuffix("A"))
    else:
        colors = image if image.mode in _SPACE_BY_MODE else image.convert("RGB")
    transform = _build_transform(profile, colors.mode)
    if transform is None:
        return image
    rgb = transform.apply(colors)
    if alpha is not None:
        rgb.putalpha(alpha)
    return rgb


def convert_to_rgb(image: Image.Image, source_name: str) -> Image.Image:
    """Convert to a new 8-bit RGB image in sRGB, without metadata, over white.

    Args:
        image: A loaded image of any mode.
        source_name: Its name in messages.

    Returns:
        The RGB image.

    Raises:
        InvalidImageError: Its pixels have no known range.
    """
    if image.mode == "F":
        raise InvalidImageError(
            f"{source_name} has floating-point pixels of unknown range, 8 or 16 bits expected: "
            "scale it to 8 bits"
        )
    if image.mode.startswith("I"):
        rgb = _convert_16_bit_to_rgb(image, source_name)
    else:
        image = convert_to_srgb(image)
        if image.has_transparency_data:
            image = image.convert("LA") if image.mode == "La" else image
            rgba = image.convert("RGBA")
            rgb = Image.new("RGB", image.size, "white")
            rgb.paste(rgba, mask=rgba)
        else:
            rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def _convert_16_bit_to_rgb(image: Image.Image, source_name: str) -> Image.Image:
    wide = image.convert("I")  # 32 bits, of which PNG fills 16
    low, high = cast(tuple[int, int], wide.getextrema())
    if low < 0 or high > 0xFFFF:
        raise InvalidImageError(
            f"{source_name} has pixels from {low} to {high}, 0 to 65535 expected: "
            "scale it to 8 or 16 bits"
        )
    gray = wide.point(_GRAY_BY_16_BITS, "L")
    gray.info["icc_profile"] = image.info.get("icc_profile")
    rgb = convert_to_srgb(gray).convert("RGB")
    if isinstance(transparent_value := image.info.get("transparency"), int):
        import numpy as np  # late, since processes that decode images seldom need it

        rgb.paste("white", mask=Image.fromarray(np.asarray(wide) == transparent_value))
    return rgb


@lru_cache(maxsize=32)
def _build_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the transform to sRGB; None if the profile does not fit, or is sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACE_BY_MODE[mode]:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        return None if mode in ("RGB", "L") and _is_identity(transform, mode) else transform
    except Exception:  # broken profiles raise anything; the pixels are good even so
        return None


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform leaves a grid of colors as they are, up to rounding."""
    import numpy as np

    levels = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, len(levels), 3)
    colors = Image.fromarray(grid if mode == "RGB" else grid[..., 0].copy())
    converted = np.asarray(transform.apply(colors), int)  # [289, 17, 3]
    expected = np.asarray(colors.convert("RGB"), int)
    return int(np.abs(converted - expected).max()) <= _MAX_IDENTITY_ERROR
