"""Captions that name identity and scene, for the base model, and prompts of the scene only."""

import numpy as np

from data_builder.avatars.identity import AvatarIdentity, Scene
from data_builder.avatars.vocabulary import COLORLESS_GARMENTS

IDENTIFIER = "sks"
"""Word without meaning that stands for the subject in prompts."""
_SUBJECT_PHRASES = ("a person", "a person", "a person", f"{IDENTIFIER} person", "ohwx person")


def build_prompt(scene: Scene, identifier: str = IDENTIFIER) -> str:
    """Build the personalized prompt of a scene: all promptable attributes, none of the identity.

    Args:
        scene: Scene to describe.
        identifier: Word that stands for the subject.

    Returns:
        Phrases separated by commas.
    """
    return ", ".join([f"a portrait of {identifier} person", *_format_scene_phrases(scene).values()])


def sample_caption(
    person: AvatarIdentity, scene: Scene, rng: np.random.Generator, identity_prob: float = 0.7
) -> str:
    """Sample a caption of a portrait that names a random subset of its attributes.

    Rare identifiers replace the subject in two of five captions, so that a LoRA can give them a
    meaning.

    Args:
        person: Identity of the portrait.
        scene: Scene of the portrait.
        rng: Random generator.
        identity_prob: Probability of naming each identity attribute. Promptable attributes have
            0.85.

    Returns:
        Phrases separated by commas.
    """
    parts = [f"a portrait of {rng.choice(_SUBJECT_PHRASES)}"]
    parts += [
        w for w in _format_identity_phrases(person, scene).values() if rng.random() < identity_prob
    ]
    parts += [w for w in _format_scene_phrases(scene).values() if rng.random() < 0.85]
    return ", ".join(parts)


def parse_caption_attributes(person: AvatarIdentity, scene: Scene, text: str) -> frozenset[str]:
    """Find the attributes that a caption of this portrait names.

    Args:
        person: Identity of the portrait.
        scene: Scene of the portrait.
        text: Caption, as ``sample_caption`` writes it.

    Returns:
        Names of attributes of ``AvatarIdentity`` and ``Scene``.
    """
    parts = set(text.split(", "))
    phrases = _format_identity_phrases(person, scene) | _format_scene_phrases(scene)
    return frozenset(
        attribute
        for attributes, phrase in phrases.items()
        if phrase in parts
        for attribute in attributes
    )


def _format_identity_phrases(person: AvatarIdentity, scene: Scene) -> dict[tuple[str, ...], str]:
    """Phrase by the attributes it names."""
    phrases: dict[tuple[str, ...], str] = {("skin",): f"{person.skin} skin"}
    if scene.hat == "none":
        phrases |= {
            ("hair_color",): f"{person.hair_color} hair",
            ("hair",): f"{person.hair} haircut",
        }
    if person.facial_hair != "none":
        phrases["facial_hair", "facial_hair_color"] = (
            f"{person.facial_hair_color} {person.facial_hair}"
        )
    return phrases | {
        ("nose",): f"{person.nose} nose",
        ("eyebrows",): f"{person.eyebrows} eyebrows",
    }


def _format_scene_phrases(scene: Scene) -> dict[tuple[str, ...], str]:
    """Phrase by the attributes it names."""
    colorless = scene.garment in COLORLESS_GARMENTS
    garment = scene.garment if colorless else f"{scene.garment_color} {scene.garment}"
    phrases: dict[tuple[str, ...], str] = {
        ("expression",): scene.expression,
        ("eyes",): f"{scene.eyes} eyes",
        ("garment",) if colorless else ("garment", "garment_color"): f"wearing a {garment}",
    }
    phrases |= {("glasses",): scene.glasses} if scene.glasses != "none" else {}
    phrases |= {("hat",): f"a {scene.garment_color} {scene.hat}"} if scene.hat != "none" else {}
    phrases[("background",)] = f"{scene.background} background"
    return phrases | ({("style",): f"{scene.style} style"} if scene.style != "plain" else {})
