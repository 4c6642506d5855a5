"""Words for portraits: captions that name who and how (for the base model), prompts that name only how."""

import numpy as np

from data_builder.avatars.identity import Identity, Scene
from data_builder.avatars.vocabulary import COLORLESS_GARMENTS

IDENTIFIER = "sks"
_NAMES = ("a person", "a person", "a person", f"{IDENTIFIER} person", "ohwx person")


def prompt(scene: Scene, identifier: str = IDENTIFIER) -> str:
    """The personalised prompt of a scene: everything promptable, nothing of the identity."""
    return ", ".join([f"a portrait of {identifier} person", *_scene_words(scene).values()])


def caption(person: Identity, scene: Scene, rng: np.random.Generator, name_identity: float = 0.7) -> str:
    """A caption that names each identity attribute with probability ``name_identity`` and each promptable one with
    probability 0.85. The identifiers appear as words without meaning, so that a LoRA may give them one."""
    parts = [f"a portrait of {rng.choice(_NAMES)}"]
    parts += [w for w in _identity_words(person, scene).values() if rng.random() < name_identity]
    parts += [w for w in _scene_words(scene).values() if rng.random() < 0.85]
    return ", ".join(parts)


def named(person: Identity, scene: Scene, text: str) -> frozenset[str]:
    """The attributes that a caption of this portrait names."""
    parts = set(text.split(", "))
    words = _identity_words(person, scene) | _scene_words(scene)
    return frozenset(attribute for attributes, said in words.items() if said in parts for attribute in attributes)


def _identity_words(person: Identity, scene: Scene) -> dict[tuple[str, ...], str]:
    out: dict[tuple[str, ...], str] = {("skin",): f"{person.skin} skin"}
    if scene.hat == "none":
        out |= {("hair_color",): f"{person.hair_color} hair", ("hair",): f"{person.hair} haircut"}
    if person.facial_hair != "none":
        out["facial_hair", "facial_hair_color"] = f"{person.facial_hair_color} {person.facial_hair}"
    return out | {("nose",): f"{person.nose} nose", ("eyebrows",): f"{person.eyebrows} eyebrows"}


def _scene_words(scene: Scene) -> dict[tuple[str, ...], str]:
    colorless = scene.garment in COLORLESS_GARMENTS
    garment = scene.garment if colorless else f"{scene.garment_color} {scene.garment}"
    out: dict[tuple[str, ...], str] = {
        ("expression",): scene.expression,
        ("eyes",): f"{scene.eyes} eyes",
        ("garment",) if colorless else ("garment", "garment_color"): f"wearing a {garment}",
    }
    out |= {("glasses",): scene.glasses} if scene.glasses != "none" else {}
    out |= {("hat",): f"a {scene.garment_color} {scene.hat}"} if scene.hat != "none" else {}
    out[("background",)] = f"{scene.background} background"
    return out | ({("style",): f"{scene.style} style"} if scene.style != "plain" else {})
