"""Who is drawn (``Identity``) and how (``Scene``), both deterministic in a seed."""

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
class Identity:
    """What stays the same in all portraits of one person. Named attributes are keys of ``vocabulary``; the ``*_rgb``
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


def hidden(scene: Scene) -> frozenset[str]:
    """Attributes that nobody can read off a portrait of this scene: eyes behind dark glasses, hair under a hat,
    colours that are not drawn."""
    out: set[str] = set()
    if scene.glasses in ("sunglasses", "white sunglasses", "eyepatch"):
        out.add("eyes")
    if scene.garment in words.COLORLESS_GARMENTS:
        out.add("garment_color")
    if scene.hat != "none":
        out |= {"hair", "hair_color"}
    if scene.style in ("grayscale", "sepia", "pencil"):
        out |= {"hair_color", "skin", "garment_color", "background"}
    return frozenset(out)


def identity(seed: int) -> Identity:
    """The person with this seed; ``SPLITS`` says which split it belongs to."""
    rng = np.random.default_rng([20261121, seed])
    hair_color = _pick(rng, words.HAIR_COLOR)
    facial_hair_color = hair_color if rng.random() < 0.7 else _pick(rng, words.HAIR_COLOR)
    skin = _pick(rng, words.SKIN)
    hair_rgb = _near(rng, words.HAIR_COLOR[hair_color])
    return Identity(
        seed=seed,
        hair=_pick(rng, words.HAIR),
        hair_color=hair_color,
        hair_rgb=hair_rgb,
        skin=skin,
        skin_rgb=_near(rng, words.SKIN[skin]),
        facial_hair="none" if rng.random() < 0.5 else _pick(rng, words.FACIAL_HAIR),
        facial_hair_color=facial_hair_color,
        facial_hair_rgb=hair_rgb
        if facial_hair_color == hair_color
        else _near(rng, words.HAIR_COLOR[facial_hair_color]),
        nose=_pick(rng, words.NOSE),
        eyebrows=_pick(rng, words.EYEBROWS),
        eye_distance=rng.uniform(0.86, 1.2),
        eye_height=rng.uniform(0.8, 1.25),
        nose_scale=rng.uniform(0.85, 1.5),
        mouth_scale=rng.uniform(0.8, 1.25),
        face_width=rng.uniform(0.9, 1.08),
    )


def scene(seed: int, number: int) -> Scene:
    """The ``number``-th random scene of person ``seed``."""
    rng = np.random.default_rng([20261122, seed, number])
    return Scene(
        expression=_pick(rng, words.EXPRESSION),
        eyes="open" if rng.random() < 0.4 else _pick(rng, words.EYES),
        glasses="none" if rng.random() < 0.5 else _pick(rng, words.GLASSES),
        garment=_pick(rng, words.GARMENT),
        garment_color=_pick(rng, words.GARMENT_COLOR),
        background=_pick(rng, words.BACKGROUND),
        hat=_pick(rng, words.HAT) if rng.random() < 0.05 else "none",
        style=str(rng.choice(words.STYLE[1:])) if rng.random() < 0.08 else "plain",
        roll=rng.uniform(-5, 5),
        shift_x=rng.uniform(-7, 7),
        shift_y=rng.uniform(-5, 5),
        zoom=rng.uniform(0.96, 1.08),
    )


def _pick(rng: np.random.Generator, table: dict[str, str]) -> str:
    return str(rng.choice(list(table)))


def _near(rng: np.random.Generator, color: str, spread: int = 14) -> Rgb:
    r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    jitter = rng.integers(-spread, spread + 1, 3)
    return tuple(int(np.clip(c + j, 0, 255)) for c, j in zip((r, g, b), jitter, strict=True))  # type: ignore[return-value]
