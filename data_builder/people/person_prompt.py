"""``PersonPrompt``: what a base is told to invent a person, from attribute lists or lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from data_builder.avatars.vocabulary import IDENTITY_ATTRIBUTES
from hyperlora.data.captions import read_text
from hyperlora.errors import InvalidArgumentError

SUBJECT_PLACEHOLDER: Final = "{}"
"""What stands for the subject in a caption, until ``data-builder run`` puts its identifier there.
"""
_AGES: Final = range(18, 81)
_GENDERS: Final = ("woman", "man")
_ETHNICITIES: Final = (
    *("Black", "East Asian", "Hispanic", "Indigenous American", "Middle Eastern"),
    *("Pacific Islander", "South Asian", "Southeast Asian", "white", "mixed-race"),
)
_HAIR_STYLES: Final = (
    *("short", "very short", "shoulder-length", "long", "curly", "wavy", "straight", "tied-back"),
    *("braided", "shaved", "receding", "tousled"),
)
_HAIR_COLORS: Final = ("black", "dark brown", "brown", "auburn", "red", "blond", "gray", "white")
_FACES: Final = (
    *("a round face", "an oval face", "a square jaw", "a narrow face", "high cheekbones"),
    *("freckles", "a broad nose", "a long nose", "full lips", "thick eyebrows", "a dimpled chin"),
    *("deep-set eyes", "wide-set eyes", "laugh lines"),
)
_PHOTO_SCENE: Final = "looking at the camera, face from the front, plain background"
_AVATAR_SCENE: Final = "smiling, open eyes, wearing a gray t-shirt, white background"
_FACIAL_HAIR_PROB: Final = 0.5
"""Share of drawn people with a beard or moustache, as in the avatars of the base's training."""
DEFAULT_SCENES: Final = (
    "smiling, in a park, daylight",
    "serious, in an office",
    "laughing, on a beach at sunset",
    "looking to the side, in a city street",
    "wearing a winter coat, in the snow",
    "wearing a suit, gray studio background",
    "in a kitchen, warm light",
    "wearing a red sweater, in a library",
)
"""Scenes for models whose card has none."""


@dataclass(frozen=True)
class PersonPrompt:
    """How a base invents a person.

    Attributes:
        prompt: The prompt of the reference.
        noun: The words for this person where no LoRA brings a trigger phrase.
        caption: The caption of the reference, with ``{}`` for the subject and without what its
            identity consists of.
    """

    prompt: str
    noun: str
    caption: str


def sample_person_prompt(seed: int, number: int, is_avatar: bool) -> PersonPrompt:
    """Sample the attributes of a person from the built-in lists.

    Args:
        seed: Seed of all people.
        number: Number of the person; what others there are does not matter.
        is_avatar: Whether the base draws avatars, and knows their attributes alone.

    Returns:
        The prompt.
    """
    rng = np.random.default_rng([seed, number])
    if is_avatar:
        return _sample_avatar(rng)
    age = int(rng.choice(_AGES))
    noun = (
        f"{'an' if age in (18, 80) else 'a'} {age}-year-old {rng.choice(_ETHNICITIES)} "
        f"{rng.choice(_GENDERS)} with {rng.choice(_HAIR_STYLES)} {rng.choice(_HAIR_COLORS)} hair "
        f"and {rng.choice(_FACES)}"
    )
    return PersonPrompt(
        f"a portrait of {noun}, {_PHOTO_SCENE}",
        noun,
        f"a portrait of {SUBJECT_PLACEHOLDER}, {_PHOTO_SCENE}",
    )


def _sample_avatar(rng: np.random.Generator) -> PersonPrompt:
    """Sample an avatar in the words of the base's training."""
    values = {name: str(rng.choice(keys)) for name, keys in IDENTITY_ATTRIBUTES.items()}
    parts = [
        f"{values['skin']} skin",
        f"{values['hair_color']} hair",
        f"{values['hair']} haircut",
        f"{values['nose']} nose",
        f"{values['eyebrows']} eyebrows",
    ]
    if rng.random() < _FACIAL_HAIR_PROB and values["facial_hair"] != "none":
        parts.insert(3, f"{values['facial_hair_color']} {values['facial_hair']}")
    noun = ", ".join(["a person", *parts])
    return PersonPrompt(
        f"a portrait of {noun}, {_AVATAR_SCENE}",
        noun,
        f"a portrait of {SUBJECT_PLACEHOLDER}, {_AVATAR_SCENE}",
    )


def get_person_prompt(prompts: Sequence[str], number: int) -> PersonPrompt:
    """Return the prompt of a person from lines that a user wrote; after the last, the first again.

    Args:
        prompts: At least one line.
        number: Number of the person.
    """
    prompt = prompts[number % len(prompts)]
    return PersonPrompt(prompt, "a person", f"a portrait of {SUBJECT_PLACEHOLDER}")


def read_lines(path: Path, option: str) -> tuple[str, ...]:
    """Read the lines of a text file that are not blank.

    Args:
        path: The file.
        option: The option that names it, for the error.

    Returns:
        The lines, without spaces around them.

    Raises:
        InvalidArgumentError: There is no line.
        InvalidImageError: The file cannot be read, or is no text.
    """
    lines = tuple(filter(None, map(str.strip, read_text(path).splitlines())))
    if not lines:
        raise InvalidArgumentError(
            f"{option} {str(path)!r} holds no line, one per line expected: write at least one"
        )
    return lines
