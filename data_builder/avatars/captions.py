"""Words for portraits: captions that name who and how (for the base model), prompts that name only how."""

import numpy as np

from data_builder.avatars.people import Identity, Scene
from data_builder.avatars.vocabulary import COLORLESS_GARMENTS

IDENTIFIER = "sks"
_NAMES = ("a person", "a person", "a person", f"{IDENTIFIER} person", "ohwx person")


def prompt(scene: Scene, identifier: str = IDENTIFIER) -> str:
    """The personalised prompt of a scene: everything promptable, nothing of the identity."""
    return ", ".join([f"a portrait of {identifier} person", *_scene_words(scene)])


def caption(person: Identity, scene: Scene, rng: np.random.Generator, name_identity: float = 0.7) -> str:
    """A caption that names each identity attribute with probability ``name_identity`` and each promptable one with
    probability 0.85. The identifiers appear as words without meaning, so that a LoRA may give them one."""
    parts = [f"a portrait of {rng.choice(_NAMES)}"]
    parts += [w for w in _identity_words(person, scene) if rng.random() < name_identity]
    parts += [w for w in _scene_words(scene) if rng.random() < 0.85]
    return ", ".join(parts)


def _identity_words(person: Identity, scene: Scene) -> list[str]:
    out = [f"{person.skin} skin"]
    if scene.hat == "none":
        out += [f"{person.hair_color} hair", f"{person.hair} haircut"]
    if person.facial_hair != "none":
        out.append(f"{person.facial_hair_color} {person.facial_hair}")
    return [*out, f"{person.nose} nose", f"{person.eyebrows} eyebrows"]


def _scene_words(scene: Scene) -> list[str]:
    garment = scene.garment if scene.garment in COLORLESS_GARMENTS else f"{scene.garment_color} {scene.garment}"
    out = [scene.expression, f"{scene.eyes} eyes", f"wearing a {garment}"]
    out += [scene.glasses] if scene.glasses != "none" else []
    out += [f"a {scene.garment_color} {scene.hat}"] if scene.hat != "none" else []
    out.append(f"{scene.background} background")
    return [*out, f"{scene.style} style"] if scene.style != "plain" else out
