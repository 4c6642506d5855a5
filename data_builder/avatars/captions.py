"""Words for portraits: captions that name who and how (for the base model), prompts that name only how."""

import numpy as np

from data_builder.avatars.identity import AvatarIdentity, Scene
from data_builder.avatars.vocabulary import COLORLESS_GARMENTS

IDENTIFIER = "sks"
_SUBJECT_PHRASES = ("a person", "a person", "a person", f"{IDENTIFIER} person", "ohwx person")


def build_prompt(scene: Scene, identifier: str = IDENTIFIER) -> str:
    """The personalised prompt of a scene: everything promptable, nothing of the identity."""
    return ", ".join([f"a portrait of {identifier} person", *_format_scene_phrases(scene).values()])


def sample_caption(
    person: AvatarIdentity, scene: Scene, rng: np.random.Generator, identity_prob: float = 0.7
) -> str:
    """A caption that names each identity attribute with probability ``identity_prob`` and each promptable one with
    probability 0.85. The identifiers appear as words without meaning, so that a LoRA may give them one."""
    parts = [f"a portrait of {rng.choice(_SUBJECT_PHRASES)}"]
    parts += [
        w for w in _format_identity_phrases(person, scene).values() if rng.random() < identity_prob
    ]
    parts += [w for w in _format_scene_phrases(scene).values() if rng.random() < 0.85]
    return ", ".join(parts)


def parse_caption_attributes(person: AvatarIdentity, scene: Scene, text: str) -> frozenset[str]:
    """The attributes that a caption of this portrait names."""
    parts = set(text.split(", "))
    phrases = _format_identity_phrases(person, scene) | _format_scene_phrases(scene)
    return frozenset(
        attribute
        for attributes, phrase in phrases.items()
        if phrase in parts
        for attribute in attributes
    )


def _format_identity_phrases(person: AvatarIdentity, scene: Scene) -> dict[tuple[str, ...], str]:
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
