"""Avatar identities and scenes, both deterministic in a seed."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from data_builder.avatars import vocabulary

SPLITS: Final = {
    "train": range(0, 1_000_000),
    "validation": range(1_000_000, 1_100_000),
    "test": range(1_100_000, 1_200_000),
}
"""Seeds of the identities of each split. No training and no choice of a checkpoint uses ``test``.
"""
Rgb = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""


@dataclass(frozen=True)
class AvatarIdentity:
    """Attributes that stay the same in all portraits of one identity.

    Attributes:
        seed: Seed of ``sample_identity``.
        hair: Haircut, a key of ``vocabulary.HAIR``.
        hair_color: Color name, a key of ``vocabulary.HAIR_COLOR``.
        hair_rgb: Exact color, within 14 of the named color in each channel.
        skin: Skin color name, a key of ``vocabulary.SKIN``.
        skin_rgb: Exact skin color.
        facial_hair: Beard or moustache, a key of ``vocabulary.FACIAL_HAIR``.
        facial_hair_color: Color name, a key of ``vocabulary.HAIR_COLOR``.
        facial_hair_rgb: Exact color of the facial hair.
        nose: Key of ``vocabulary.NOSE``.
        eyebrows: Key of ``vocabulary.EYEBROWS``.
        eye_distance: Scale of the distance between the eyes, 1 is the library's.
        eye_height: Vertical scale of the eyes.
        nose_scale: Scale of the nose.
        mouth_scale: Scale of the mouth.
        face_width: Horizontal scale of the head.
    """

    seed: int
    hair: str
    hair_color: str
    hair_rgb: Rgb
    skin: str
    skin_rgb: Rgb
    facial_hair: str
    facial_hair_color: str
    facial_hair_rgb: Rgb
    nose: str
    eyebrows: str
    eye_distance: float
    eye_height: float
    nose_scale: float
    mouth_scale: float
    face_width: float


@dataclass(frozen=True)
class Scene:
    """Attributes that a prompt names, and the pose, which no prompt names.

    Attributes:
        expression: Key of ``vocabulary.EXPRESSION``.
        eyes: Key of ``vocabulary.EYES``.
        glasses: Key of ``vocabulary.GLASSES``.
        garment: Key of ``vocabulary.GARMENT``.
        garment_color: Key of ``vocabulary.GARMENT_COLOR``.
        background: Key of ``vocabulary.BACKGROUND``, or ``#rrggbb``.
        hat: Key of ``vocabulary.HAT``.
        style: Drawing style of the image, one of ``vocabulary.STYLE``.
        tone: Light over the image, one of ``vocabulary.TONE``.
        roll: Rotation of the person in degrees.
        shift_x: Horizontal shift in drawing units.
        shift_y: Vertical shift in drawing units.
        zoom: Scale of the person.
    """

    expression: str = "neutral"
    eyes: str = "open"
    glasses: str = "none"
    garment: str = "t-shirt"
    garment_color: str = "blue"
    background: str = "white"
    hat: str = "none"
    style: str = "plain"
    tone: str = "plain"
    roll: float = 0.0
    shift_x: float = 0.0
    shift_y: float = 0.0
    zoom: float = 1.0


def list_hidden_attributes(scene: Scene) -> frozenset[str]:
    """List the attributes that a portrait of this scene does not show.

    Dark glasses hide the eyes, a hat hides the hair, and monochrome styles hide colors.
    """
    attributes: set[str] = set()
    if scene.glasses in ("sunglasses", "white sunglasses", "eyepatch"):
        attributes.add("eyes")
    if scene.garment in vocabulary.COLORLESS_GARMENTS:
        attributes.add("garment_color")
    if scene.hat != "none":
        attributes |= {"hair", "hair_color"}
    if scene.style in ("grayscale", "sepia", "pencil"):
        attributes |= {"hair_color", "skin", "garment_color", "background"}
    return frozenset(attributes)


def sample_identity(seed: int) -> AvatarIdentity:
    """Sample the identity of a seed; ``SPLITS`` assigns seeds to splits."""
    rng = np.random.default_rng([20261121, seed])
    hair_color = _sample_key(rng, vocabulary.HAIR_COLOR)
    facial_hair_color = (
        hair_color if rng.random() < 0.7 else _sample_key(rng, vocabulary.HAIR_COLOR)
    )
    skin = _sample_key(rng, vocabulary.SKIN)
    hair_rgb = _sample_color_near(rng, vocabulary.HAIR_COLOR[hair_color])
    return AvatarIdentity(
        seed=seed,
        hair=_sample_key(rng, vocabulary.HAIR),
        hair_color=hair_color,
        hair_rgb=hair_rgb,
        skin=skin,
        skin_rgb=_sample_color_near(rng, vocabulary.SKIN[skin]),
        facial_hair="none" if rng.random() < 0.5 else _sample_key(rng, vocabulary.FACIAL_HAIR),
        facial_hair_color=facial_hair_color,
        facial_hair_rgb=hair_rgb
        if facial_hair_color == hair_color
        else _sample_color_near(rng, vocabulary.HAIR_COLOR[facial_hair_color]),
        nose=_sample_key(rng, vocabulary.NOSE),
        eyebrows=_sample_key(rng, vocabulary.EYEBROWS),
        eye_distance=rng.uniform(0.86, 1.2),
        eye_height=rng.uniform(0.8, 1.25),
        nose_scale=rng.uniform(0.85, 1.5),
        mouth_scale=rng.uniform(0.8, 1.25),
        face_width=rng.uniform(0.9, 1.08),
    )


def sample_scene(seed: int, index: int) -> Scene:
    """Sample a random scene of one identity.

    Args:
        seed: Seed of the identity.
        index: Number of the scene; each number gives another scene.

    Returns:
        The scene, without tone (``plain``).
    """
    rng = np.random.default_rng([20261122, seed, index])
    return Scene(
        expression=_sample_key(rng, vocabulary.EXPRESSION),
        eyes="open" if rng.random() < 0.4 else _sample_key(rng, vocabulary.EYES),
        glasses="none" if rng.random() < 0.5 else _sample_key(rng, vocabulary.GLASSES),
        garment=_sample_key(rng, vocabulary.GARMENT),
        garment_color=_sample_key(rng, vocabulary.GARMENT_COLOR),
        background=_sample_key(rng, vocabulary.BACKGROUND),
        hat=_sample_key(rng, vocabulary.HAT) if rng.random() < 0.05 else "none",
        style=str(rng.choice(vocabulary.STYLE[1:])) if rng.random() < 0.08 else "plain",
        roll=rng.uniform(-5, 5),
        shift_x=rng.uniform(-7, 7),
        shift_y=rng.uniform(-5, 5),
        zoom=rng.uniform(0.96, 1.08),
    )


def _sample_key(rng: np.random.Generator, table: dict[str, str]) -> str:
    return str(rng.choice(list(table)))


def _sample_color_near(rng: np.random.Generator, color: str, max_shift: int = 14) -> Rgb:
    """Sample a color within ``max_shift`` of ``color`` (``#rrggbb``) in each channel."""
    channels = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    shifts = rng.integers(-max_shift, max_shift + 1, 3)
    red, green, blue = (
        int(np.clip(channel + shift, 0, 255))
        for channel, shift in zip(channels, shifts, strict=True)
    )
    return red, green, blue
