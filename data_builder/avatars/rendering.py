"""Draw a person in a scene: vector parts from ``python_avatars``, rasterised by resvg, then the drawing style."""

import io
from functools import cache
from typing import NamedTuple

import numpy as np
import python_avatars as pa
import resvg_py
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from data_builder.avatars import vocabulary as words
from data_builder.avatars.identity import AvatarIdentity, Rgb, Scene

# the drawing library's template: each group's own transform, which the face geometry is multiplied onto
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
    """SVG transforms: of eyes, nose, mouth and eyebrows in the face, and of the whole person."""

    eyes: str
    nose: str
    mouth: str
    eyebrows: str
    pose: str


def render_portrait(person: AvatarIdentity, scene: Scene, size: int = 128) -> Image.Image:
    """The portrait, RGB, ``size`` x ``size`` pixels."""
    png = resvg_py.svg_to_bytes(
        svg_string=build_svg(person, scene),
        background=words.resolve_color(words.BACKGROUND, scene.background),
        width=size,
        height=size,
        skip_system_fonts=True,
    )
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    return apply_tone(apply_style(image, scene.style), scene.tone)


def build_svg(person: AvatarIdentity, scene: Scene) -> str:
    """The portrait without background as SVG text."""
    hat = words.HAT[scene.hat]
    text = pa.Avatar(
        style=pa.AvatarStyle.TRANSPARENT,
        top=pa.HatType[hat] if hat != "NONE" else pa.HairType[words.HAIR[person.hair]],
        hat_color=words.resolve_color(words.GARMENT_COLOR, scene.garment_color),
        eyebrows=pa.EyebrowType[words.EYEBROWS[person.eyebrows]],
        eyes=pa.EyeType[words.EYES[scene.eyes]],
        nose=pa.NoseType[words.NOSE[person.nose]],
        mouth=pa.MouthType[words.EXPRESSION[scene.expression]],
        facial_hair=pa.FacialHairType[words.FACIAL_HAIR[person.facial_hair]],
        skin_color=_format_hex(person.skin_rgb),
        hair_color=_format_hex(person.hair_rgb),
        facial_hair_color=_format_hex(person.facial_hair_rgb),
        accessory=pa.AccessoryType[words.GLASSES[scene.glasses]],
        clothing=pa.ClothingType[words.GARMENT[scene.garment]],
        clothing_color=words.resolve_color(words.GARMENT_COLOR, scene.garment_color),
    ).render()
    for anchor, transform in zip(_ANCHORS, compute_transforms(person, scene), strict=True):
        if text.count(anchor) != 1:
            raise RuntimeError(f"python_avatars' template has changed: {anchor} expected once")
        text = text.replace(anchor, f'{anchor.split(" ")[0]} transform="{transform}"')
    return text.replace(_VIEW, f'viewBox="{CROP_LEFT} {CROP_TOP} {CROP_SIZE} {CROP_SIZE}"')


def compute_transforms(person: AvatarIdentity, scene: Scene) -> PartTransforms:
    """The SVG transforms of the parts of this portrait."""
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
    """The picture in one of ``build_vocabulary.STYLE``'s drawing styles (same size)."""
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
    raise ValueError(f"unknown style {style!r}; known: {', '.join(words.STYLE)}")


def apply_tone(image: Image.Image, tone: str) -> Image.Image:
    """The picture in one of ``build_vocabulary.TONE``'s lights (same size)."""
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
    raise ValueError(f"unknown light {tone!r}; known: {', '.join(words.TONE)}")


def _scale_about(x: float, y: float, scale_x: float, scale_y: float) -> str:
    return f"translate({x} {y}) scale({scale_x:.4f} {scale_y:.4f}) translate({-x} {-y})"


@cache
def _format_hex(rgb: Rgb) -> str:
    return "#{:02X}{:02X}{:02X}".format(*rgb)
