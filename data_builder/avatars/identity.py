"""Who is drawn (``AvatarIdentity``) and how (``Scene``), both deterministic in a seed."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from data_builder.avatars import vocabulary as words

SPLITS: Final = {
    "train": range(0, 1_000_000),
    "validation": range(1_000_000, 1_100_000),
    "test": range(1_100_000, 1_200_000),
}
"""Seeds of the identities of each split. No training and no choice of a checkpoint ever sees ``test``."""
Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class AvatarIdentity:
    """What stays the same in all portraits of one person. Named attributes are keys of ``build_vocabulary``; the ``*_parse_rgb``
    are the exact colours around the named ones; geometry values are scale factors around 1."""

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
    """What a prompt may ask for, and the pose, which nobody asks for (``roll`` degrees, shifts in drawing units)."""

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
    """Attributes that nobody can read off a portrait of this scene: eyes behind dark glasses, hair under a hat,
    colours that are not drawn."""
    attributes: set[str] = set()
    if scene.glasses in ("sunglasses", "white sunglasses", "eyepatch"):
        attributes.add("eyes")
    if scene.garment in words.COLORLESS_GARMENTS:
        attributes.add("garment_color")
    if scene.hat != "none":
        attributes |= {"hair", "hair_color"}
    if scene.style in ("grayscale", "sepia", "pencil"):
        attributes |= {"hair_color", "skin", "garment_color", "background"}
    return frozenset(attributes)


def sample_identity(seed: int) -> AvatarIdentity:
    """The person with this seed; ``SPLITS`` says which split it belongs to."""
    rng = np.random.default_rng([20261121, seed])
    hair_color = _sample_key(rng, words.HAIR_COLOR)
    facial_hair_color = hair_color if rng.random() < 0.7 else _sample_key(rng, words.HAIR_COLOR)
    skin = _sample_key(rng, words.SKIN)
    hair_rgb = _sample_color_near(rng, words.HAIR_COLOR[hair_color])
    return AvatarIdentity(
        seed=seed,
        hair=_sample_key(rng, words.HAIR),
        hair_color=hair_color,
        hair_rgb=hair_rgb,
        skin=skin,
        skin_rgb=_sample_color_near(rng, words.SKIN[skin]),
        facial_hair="none" if rng.random() < 0.5 else _sample_key(rng, words.FACIAL_HAIR),
        facial_hair_color=facial_hair_color,
        facial_hair_rgb=hair_rgb
        if facial_hair_color == hair_color
        else _sample_color_near(rng, words.HAIR_COLOR[facial_hair_color]),
        nose=_sample_key(rng, words.NOSE),
        eyebrows=_sample_key(rng, words.EYEBROWS),
        eye_distance=rng.uniform(0.86, 1.2),
        eye_height=rng.uniform(0.8, 1.25),
        nose_scale=rng.uniform(0.85, 1.5),
        mouth_scale=rng.uniform(0.8, 1.25),
        face_width=rng.uniform(0.9, 1.08),
    )


def sample_scene(seed: int, index: int) -> Scene:
    """The ``index``-th random scene of person ``seed``."""
    rng = np.random.default_rng([20261122, seed, index])
    return Scene(
        expression=_sample_key(rng, words.EXPRESSION),
        eyes="open" if rng.random() < 0.4 else _sample_key(rng, words.EYES),
        glasses="none" if rng.random() < 0.5 else _sample_key(rng, words.GLASSES),
        garment=_sample_key(rng, words.GARMENT),
        garment_color=_sample_key(rng, words.GARMENT_COLOR),
        background=_sample_key(rng, words.BACKGROUND),
        hat=_sample_key(rng, words.HAT) if rng.random() < 0.05 else "none",
        style=str(rng.choice(words.STYLE[1:])) if rng.random() < 0.08 else "plain",
        roll=rng.uniform(-5, 5),
        shift_x=rng.uniform(-7, 7),
        shift_y=rng.uniform(-5, 5),
        zoom=rng.uniform(0.96, 1.08),
    )


def _sample_key(rng: np.random.Generator, table: dict[str, str]) -> str:
    return str(rng.choice(list(table)))


def _sample_color_near(rng: np.random.Generator, color: str, max_shift: int = 14) -> Rgb:
    r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    jitter = rng.integers(-max_shift, max_shift + 1, 3)
    return tuple(int(np.clip(c + j, 0, 255)) for c, j in zip((r, g, b), jitter, strict=True))  # type: ignore[return-value]
