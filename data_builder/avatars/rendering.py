"""Rendering of an identity in a scene: vector parts of ``python_avatars``, rasterized by resvg,
then style and tone.
"""

import io
from functools import cache
from typing import NamedTuple

import numpy as np
import python_avatars as pa
import resvg_py
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from data_builder.avatars import vocabulary
from data_builder.avatars.identity import AvatarIdentity, Rgb, Scene

# groups of the drawing library's template with their own transforms, which are replaced
_EYES = '"transparent_Eyes" transform="translate(0.000000, 8.000000)"'
_NOSE = '"transparent_Nose" transform="translate(28.000000, 40.000000)"'
_MOUTH = '"transparent_Mouth" transform="translate(2.000000, 52.000000)"'
_BROWS = '"transparent_Eyebrow"'
_PERSON = '"transparent_Avataaar/Default"'
_ANCHORS = (_EYES, _NOSE, _MOUTH, _BROWS, _PERSON)
_VIEW = 'width="264px" height="280px" viewBox="0 0 264 280"'
CROP_LEFT, CROP_TOP, CROP_SIZE = 2, 8, 260
"""The square of the drawing that a portrait shows, in drawing units."""


class PartTransforms(NamedTuple):
    """SVG transforms of the parts of a portrait.

    Attributes:
        eyes: Transform of the eyes in the face.
        nose: Transform of the nose in the face.
        mouth: Transform of the mouth in the face.
        eyebrows: Transform of the eyebrows in the face.
        pose: Transform of the whole person.
    """

    eyes: str
    nose: str
    mouth: str
    eyebrows: str
    pose: str


def render_portrait(person: AvatarIdentity, scene: Scene, size: int = 128) -> Image.Image:
    """Render a portrait.

    Args:
        person: Identity to draw.
        scene: Expression, clothes, background, style and pose.
        size: Side of the image in pixels.

    Returns:
        RGB image of ``size`` x ``size`` pixels.
    """
    png = resvg_py.svg_to_bytes(
        svg_string=build_svg(person, scene),
        background=vocabulary.resolve_color(vocabulary.BACKGROUND, scene.background),
        width=size,
        height=size,
        skip_system_fonts=True,
    )
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    return apply_tone(apply_style(image, scene.style), scene.tone)


def build_svg(person: AvatarIdentity, scene: Scene) -> str:
    """Build the portrait without background as SVG text.

    Args:
        person: Identity to draw.
        scene: Scene to draw it in; style and tone are not part of the SVG.

    Returns:
        SVG text whose view box is the square of ``CROP_SIZE``.

    Raises:
        RuntimeError: If the template of ``python_avatars`` lacks an expected group.
    """
    hat = vocabulary.HAT[scene.hat]
    text = pa.Avatar(
        style=pa.AvatarStyle.TRANSPARENT,
        top=pa.HatType[hat] if hat != "NONE" else pa.HairType[vocabulary.HAIR[person.hair]],
        hat_color=vocabulary.resolve_color(vocabulary.GARMENT_COLOR, scene.garment_color),
        eyebrows=pa.EyebrowType[vocabulary.EYEBROWS[person.eyebrows]],
        eyes=pa.EyeType[vocabulary.EYES[scene.eyes]],
        nose=pa.NoseType[vocabulary.NOSE[person.nose]],
        mouth=pa.MouthType[vocabulary.EXPRESSION[scene.expression]],
        facial_hair=pa.FacialHairType[vocabulary.FACIAL_HAIR[person.facial_hair]],
        skin_color=_format_hex(person.skin_rgb),
        hair_color=_format_hex(person.hair_rgb),
        facial_hair_color=_format_hex(person.facial_hair_rgb),
        accessory=pa.AccessoryType[vocabulary.GLASSES[scene.glasses]],
        clothing=pa.ClothingType[vocabulary.GARMENT[scene.garment]],
        clothing_color=vocabulary.resolve_color(vocabulary.GARMENT_COLOR, scene.garment_color),
    ).render()
    for anchor, transform in zip(_ANCHORS, compute_transforms(person, scene), strict=True):
        if text.count(anchor) != 1:
            raise RuntimeError(f"python_avatars' template has changed: {anchor} expected once")
        text = text.replace(anchor, f'{anchor.split(" ")[0]} transform="{transform}"')
    return text.replace(_VIEW, f'viewBox="{CROP_LEFT} {CROP_TOP} {CROP_SIZE} {CROP_SIZE}"')


def compute_transforms(person: AvatarIdentity, scene: Scene) -> PartTransforms:
    """Compute the SVG transforms of the parts of a portrait.

    Args:
        person: Identity, whose geometry scales the parts.
        scene: Scene, whose pose moves the whole person.
    """
    d, h, n, m = person.eye_distance, person.eye_height, person.nose_scale, person.mouth_scale
    pose = (
        f"translate({scene.shift_x:.3f} {scene.shift_y:.3f}) rotate({scene.roll:.3f} 132 200) "
        + _scale_about(132, 160, scene.zoom * person.face_width, scene.zoom)
    )
    return PartTransforms(
        eyes=f"{_scale_about(56, 20, d, 1)} translate(0 8) {_scale_about(56, 20, 1, h)}",
        nose=f"translate(28 40) {_scale_about(28, 8, n, n)}",
        mouth=f"translate(2 52) {_scale_about(54, 18, m, m)}",
        eyebrows=_scale_about(56, 10, d, 1),
        pose=pose,
    )


def apply_style(image: Image.Image, style: str) -> Image.Image:
    """Apply a drawing style to an image.

    Args:
        image: RGB image.
        style: One of ``vocabulary.STYLE``; ``plain`` returns the image as it is.

    Returns:
        Image of the same size.

    Raises:
        ValueError: For an unknown style.
    """
    match style:
        case "plain":
            return image
        case "grayscale":
            return ImageOps.grayscale(image).convert("RGB")
        case "sepia":
            return ImageOps.colorize(ImageOps.grayscale(image), "#2b1708", "#fff3da", mid="#a67c52")
        case "negative":
            return ImageOps.invert(image)
        case "pixel":
            small = image.resize((image.width // 4, image.height // 4), Image.Resampling.BOX)
            return small.resize(image.size, Image.Resampling.NEAREST)
        case "pencil":
            gray = ImageOps.grayscale(image)
            blurred = gray.filter(ImageFilter.GaussianBlur(image.width / 40))
            ratio = np.asarray(gray, np.float32) / np.maximum(np.asarray(blurred, np.float32), 1)
            return Image.fromarray((np.clip(ratio, 0, 1) ** 2 * 255).astype(np.uint8)).convert(
                "RGB"
            )
    raise ValueError(f"unknown style {style!r}; known: {', '.join(vocabulary.STYLE)}")


def apply_tone(image: Image.Image, tone: str) -> Image.Image:
    """Apply a light to an image.

    Args:
        image: RGB image.
        tone: One of ``vocabulary.TONE``; ``plain`` returns the image as it is.

    Returns:
        Image of the same size.

    Raises:
        ValueError: For an unknown tone.
    """
    match tone:
        case "plain":
            return image
        case "dark":
            return ImageEnhance.Brightness(image).enhance(0.55)
        case "bright":
            return Image.blend(image, Image.new("RGB", image.size, "white"), 0.4)
        case "warm":
            return ImageChops.multiply(image, Image.new("RGB", image.size, "#ffdca0"))
        case "cold":
            return ImageChops.multiply(image, Image.new("RGB", image.size, "#a8c8ff"))
        case "soft":
            return Image.blend(image, Image.new("RGB", image.size, "#808080"), 0.5)
    raise ValueError(f"unknown light {tone!r}; known: {', '.join(vocabulary.TONE)}")


def _scale_about(x: float, y: float, scale_x: float, scale_y: float) -> str:
    """Format a scaling about the point (x, y) as SVG transform."""
    return f"translate({x} {y}) scale({scale_x:.4f} {scale_y:.4f}) translate({-x} {-y})"


@cache
def _format_hex(rgb: Rgb) -> str:
    return "#{:02X}{:02X}{:02X}".format(*rgb)
