"""Before/after pairs of the avatar world: the same edit of one or two attributes on several
identities.
"""

from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import numpy as np

from data_builder.avatars import vocabulary
from data_builder.avatars.identity import (
    SPLITS,
    AvatarIdentity,
    Scene,
    list_hidden_attributes,
    sample_identity,
    sample_scene,
)
from data_builder.avatars.instructions import (
    ABSENT_VALUES,
    ATTRIBUTE_VALUES,
    CONTINUOUS_PREFIX,
    EDIT_KINDS,
    HELD_OUT_COMBINATIONS,
    HELD_OUT_VALUE,
    format_instruction,
)

Portrait = tuple[AvatarIdentity, Scene]


@dataclass(frozen=True)
class AttributeEdit:
    """An edit of one attribute, the same on every identity.

    Attributes:
        attribute: Attribute of ``AvatarIdentity`` or ``Scene``.
        before: Value before the edit, a name or ``#rrggbb``.
        after: Value after the edit.
    """

    attribute: str
    before: str
    after: str

    @property
    def kind(self) -> str:
        """The attribute, with ``CONTINUOUS_PREFIX`` if the value is an exact color."""
        return CONTINUOUS_PREFIX + self.attribute if self.after.startswith("#") else self.attribute

    @property
    def instruction(self) -> str:
        """The edit prompt; for an exact color, of the nearest color with a name."""
        return format_instruction(self.attribute, self.after)

    def reverse(self) -> "AttributeEdit":
        """Swap the values before and after."""
        return replace(self, before=self.after, after=self.before)


@dataclass(frozen=True)
class AvatarPair:
    """One identity before and after an edit.

    Attributes:
        before: Portrait before the edit.
        after: Portrait after the edit.
        edits: Edited attributes, one or two.
    """

    before: Portrait
    after: Portrait
    edits: tuple[AttributeEdit, ...]

    @property
    def instruction(self) -> str:
        """The edit prompts, separated by commas."""
        return ", ".join(edit.instruction for edit in self.edits)


def sample_edit(rng: np.random.Generator, kind: str) -> AttributeEdit:
    """Sample a random edit of one kind, except ``HELD_OUT_VALUE``.

    Args:
        rng: Random generator.
        kind: One of ``EDIT_KINDS``.

    Returns:
        The edit. Where an attribute can be absent, 70 % of edits add it and 30 % remove it.
    """
    attribute = kind.removeprefix(CONTINUOUS_PREFIX)
    if kind != attribute:
        before, after = (f"#{r:02x}{g:02x}{b:02x}" for r, g, b in rng.integers(20, 245, (2, 3)))
        return AttributeEdit(attribute, before, after)
    values = [v for v in ATTRIBUTE_VALUES[kind] if (kind, v) != HELD_OUT_VALUE]
    if kind in ABSENT_VALUES:
        absent_value = ABSENT_VALUES[kind]
        present_value = str(rng.choice([v for v in values if v != absent_value]))
        before, after = (
            (absent_value, present_value) if rng.random() < 0.7 else (present_value, absent_value)
        )
    else:
        before, after = (str(v) for v in rng.choice(values, 2, replace=False))
    return AttributeEdit(attribute, before, after)


def sample_edits(
    rng: np.random.Generator, kinds: tuple[str, ...] = EDIT_KINDS, two_edit_fraction: float = 0.2
) -> tuple[AttributeEdit, ...]:
    """Sample an edit of one attribute, or of two that training may combine.

    Args:
        rng: Random generator.
        kinds: Kinds to sample from.
        two_edit_fraction: Probability of two attributes, 0 to 1.

    Returns:
        One or two edits.
    """
    first_kind = str(rng.choice(kinds))
    compatible_kinds = [
        k
        for k in kinds
        if _are_compatible(first_kind, k)
        and frozenset({first_kind, k}) not in HELD_OUT_COMBINATIONS
    ]
    if rng.random() >= two_edit_fraction or not compatible_kinds:
        return (sample_edit(rng, first_kind),)
    return sample_edit(rng, first_kind), sample_edit(rng, str(rng.choice(compatible_kinds)))


def _are_compatible(first_kind: str, second_kind: str) -> bool:
    """Whether a portrait shows both edits: different attributes, no hair under a hat, no colors in
    a monochrome style.
    """
    attributes = {
        first_kind.removeprefix(CONTINUOUS_PREFIX),
        second_kind.removeprefix(CONTINUOUS_PREFIX),
    }
    conflicting = ({"hat", "hair"}, {"hat", "hair_color"}, {"glasses", "eyes"})
    return len(attributes) == 2 and attributes not in conflicting and "style" not in attributes


def make_pair(portrait: Portrait, edits: tuple[AttributeEdit, ...]) -> AvatarPair:
    """Apply edits to a portrait, in a scene that shows them.

    Args:
        portrait: Identity and scene; attributes that hide the edits are removed.
        edits: Edits to apply.

    Returns:
        The portrait with the values before and after.
    """
    person, scene = _make_visible(portrait, {edit.attribute for edit in edits})
    before = {edit.attribute: edit.before for edit in edits}
    after = {edit.attribute: edit.after for edit in edits}
    return AvatarPair(
        apply_edits(person, scene, **before), apply_edits(person, scene, **after), edits
    )


def sample_pairs(
    split: str,
    edit_index: int,
    num_identities: int,
    kinds: tuple[str, ...] = EDIT_KINDS,
    two_edit_fraction: float = 0.2,
) -> list[AvatarPair]:
    """Sample one edit of a split, applied to identities of its own.

    The first 50,000 seeds of a split are reserved for portraits and benchmarks.

    Args:
        split: ``train``, ``validation`` or ``test``.
        edit_index: Number of the edit.
        num_identities: Identities that the edit is applied to.
        kinds: Kinds to sample from.
        two_edit_fraction: Probability of an edit of two attributes, 0 to 1.

    Returns:
        One pair per identity.
    """
    seeds = SPLITS[split]
    edits = sample_edits(
        np.random.default_rng([20261123, seeds.start, edit_index]), kinds, two_edit_fraction
    )
    offset = 50_000 + edit_index * num_identities
    return [
        make_pair((sample_identity(seed), sample_scene(seed, 0)), edits)
        for seed in seeds[offset : offset + num_identities]
    ]


def _make_visible(portrait: Portrait, attributes: set[str]) -> Portrait:
    """Remove from the scene what hides the edited attributes."""
    person, scene = portrait
    scene = replace(scene, style="plain", tone="plain", hat="none")
    if "eyes" in attributes and "eyes" in list_hidden_attributes(scene):
        scene = replace(scene, glasses="none")
    if "garment_color" in attributes and scene.garment in vocabulary.COLORLESS_GARMENTS:
        scene = replace(scene, garment="hoodie")
    return person, scene


EDITABLE_ATTRIBUTES: Final = tuple(ATTRIBUTE_VALUES)
"""Attributes that ``apply_edits`` can set, both promptable and identity ones."""
IdentityOrScene = TypeVar("IdentityOrScene", AvatarIdentity, Scene)
_RGB_FIELDS: Final = {"hair_color": "hair_rgb", "skin": "skin_rgb"}


def apply_edits(person: AvatarIdentity, scene: Scene, **edits: str) -> tuple[AvatarIdentity, Scene]:
    """Set attributes of a portrait, e.g. ``apply_edits(person, scene, glasses="sunglasses",
    style="sepia")``.

    Args:
        person: Identity.
        scene: Scene.
        edits: New value by attribute, a name or for colors ``#rrggbb``.

    Returns:
        Identity and scene with these values.

    Raises:
        ValueError: For an attribute that is not in ``EDITABLE_ATTRIBUTES``.
    """
    for name, value in edits.items():
        if name not in EDITABLE_ATTRIBUTES:
            raise ValueError(f"cannot edit {name!r}; editable: {', '.join(EDITABLE_ATTRIBUTES)}")
        if name in vocabulary.PROMPT_ATTRIBUTES or name == "tone":
            scene = _replace_field(scene, name, value)
            continue
        person = _replace_field(person, name, value)
        if name in _RGB_FIELDS:
            table = vocabulary.SKIN if name == "skin" else vocabulary.HAIR_COLOR
            color = vocabulary.resolve_color(table, value)
            rgb = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
            person = _replace_field(person, _RGB_FIELDS[name], rgb)
    return person, scene


def _replace_field(instance: IdentityOrScene, name: str, value: object) -> IdentityOrScene:
    fields: dict[str, Any] = {name: value}
    return replace(instance, **fields)
