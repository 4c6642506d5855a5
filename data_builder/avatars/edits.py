"""Before/after pairs of the avatar world: one change (or two), the same on several people, exact in every pixel."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, TypeVar

import numpy as np

from data_builder.avatars import vocabulary as words
from data_builder.avatars.identity import (
    SPLITS,
    AvatarIdentity,
    Scene,
    list_hidden_attributes,
    sample_identity,
    sample_scene,
)
from hyperlora.prompt_blending import apply_prompt_template, combine_blends

Portrait = tuple[AvatarIdentity, Scene]
UNDO_TEMPLATE: Final = "back to {}"
"""How a LoRA's negative asks for what was before an edit: in other words than those that ask for it as an edit, so that
both can be told apart in one sum."""
CONTINUOUS_PREFIX: Final = "exact "
"""What the kinds begin with whose values are any colour, ``#rrggbb``, and no name says which."""
_ATTRIBUTE_VALUES: Final = {
    "glasses": words.GLASSES,
    "hat": words.HAT,
    "facial_hair": words.FACIAL_HAIR,
    "hair_color": words.HAIR_COLOR,
    "hair": words.HAIR,
    "expression": words.EXPRESSION,
    "eyes": words.EYES,
    "garment": words.GARMENT,
    "garment_color": words.GARMENT_COLOR,
    "background": words.BACKGROUND,
    "skin": words.SKIN,
    "style": words.STYLE,
    "tone": words.TONE,
}
_ABSENT_VALUES: Final = {
    "glasses": "none",
    "hat": "none",
    "facial_hair": "none",
    "style": "plain",
    "tone": "plain",
}
"""Kinds that are something added (or taken away): one of the two values is this one."""
EDIT_KINDS: Final = (
    *_ATTRIBUTE_VALUES,
    *(CONTINUOUS_PREFIX + name for name in ("background", "garment_color", "hair_color")),
)
HELD_OUT_KINDS: Final = ("hat", "skin")
"""No network that reads pairs is ever trained on these; the edit base knows them by name."""
HELD_OUT_VALUE: Final = ("style", "negative")
"""No edit of any training, not even of the edit base, is this one."""
HELD_OUT_COMBINATIONS: Final = (
    frozenset({"glasses", "background"}),
    frozenset({"expression", "hair_color"}),
    frozenset({"garment", "tone"}),
    frozenset({"facial_hair", "garment_color"}),
)
"""Attributes that no pair a network is trained on changes at once, though each is seen alone."""


@dataclass(frozen=True)
class AttributeEdit:
    """``attribute`` goes from ``previous_values`` to ``after``: the same edit on whomever it is made."""

    attribute: str
    before: str
    after: str

    @property
    def kind(self) -> str:
        return CONTINUOUS_PREFIX + self.attribute if self.after.startswith("#") else self.attribute

    @property
    def instruction(self) -> str:
        """The edit in words; of an exact colour, the nearest one that has a name."""
        return format_instruction(self.attribute, self.after)

    def reverse(self) -> "AttributeEdit":
        return replace(self, before=self.after, after=self.before)


@dataclass(frozen=True)
class AvatarPair:
    """One person ``previous_values`` and ``after`` some changes."""

    before: Portrait
    after: Portrait
    edits: tuple[AttributeEdit, ...]

    @property
    def instruction(self) -> str:
        return ", ".join(change.instruction for change in self.edits)


def format_instruction(attribute: str, value: str) -> str:
    """What a user would type to have ``attribute`` become ``value``, in words of the captions."""
    if value.startswith("#"):
        value = find_nearest_color(attribute, value)
    absent = value == "none"
    match attribute:
        case "glasses":
            return "no glasses" if absent else f"wearing {value}"
        case "hat":
            return "no hat" if absent else f"wearing a {value}"
        case "facial_hair":
            return "no beard" if absent else f"a {value}"
        case "hair_color":
            return f"{value} hair"
        case "hair":
            return f"{value} haircut"
        case "eyes":
            return f"{value} eyes"
        case "garment":
            return f"wearing a {value}"
        case "garment_color":
            return f"{value} clothes"
        case "background" | "skin" | "style":
            return f"{value} {attribute}"
        case "tone":
            return f"{value} light"
    return value  # an expression


def compose_instruction(values: Sequence[tuple[str, str]], use_mixture: bool = False) -> str:
    """What asks for these values of attributes at once, as ``main_callback.prompt_blending``: the sum of what asks for each, so that
    words of changes add up as their LoRAs do; of an exact colour, which has no name, a mixture of those that have. With
    ``use_mixture`` those that have one are mixtures too, as whoever sees a colour cannot know whether it has a name."""
    return combine_blends(_compute_prompt_weights(values, use_mixture))


def compose_instruction_with_undo(
    values: Sequence[tuple[str, str]],
    previous_values: Sequence[tuple[str, str]],
    use_mixture: bool = False,
    undo: bool = False,
) -> str:
    """``compose_instruction``, less what would ask to go ``UNDO_TEMPLATE`` to the values before; with ``undo`` the negative of that, which
    asks for these."""
    sign = -1.0 if undo else 1.0
    weights = {
        prompt: sign * weight
        for prompt, weight in _compute_prompt_weights(values, use_mixture).items()
    }
    return combine_blends(
        weights
        | {
            apply_prompt_template(k, UNDO_TEMPLATE): -sign * weight
            for k, weight in _compute_prompt_weights(previous_values, use_mixture).items()
        }
    )


def _compute_prompt_weights(
    values: Sequence[tuple[str, str]], use_mixture: bool
) -> dict[str, float]:
    """How much of each plain prompt asks for these values."""
    prompt_weights: defaultdict[str, float] = defaultdict(float)
    for attribute, value in values:
        for name, weight in _compute_mixture_weights(attribute, value, use_mixture).items():
            prompt_weights[format_instruction(attribute, name)] += weight
    return prompt_weights


def build_vocabulary() -> dict[str, Any]:
    """What changes that a network may be shown are called, as ``main_callback.models.instruction_vocabulary`` reads it: one of the
    values of an attribute, or a colour between black, red, green and blue; how to ask for the way back; and what else
    the edit base knows, which no network is shown."""
    corners = ("#000000", "#ff0000", "#00ff00", "#0000ff")
    color_axes = {
        k: [compose_instruction([(k, color)]) for color in corners]
        for k in _ATTRIBUTE_VALUES
        if CONTINUOUS_PREFIX + k in EDIT_KINDS
    }
    categorical_attributes = [
        k for k in _ATTRIBUTE_VALUES if k not in color_axes and k not in HELD_OUT_KINDS
    ]
    categories = {
        k: [format_instruction(k, v) for v in _ATTRIBUTE_VALUES[k] if (k, v) != HELD_OUT_VALUE]
        for k in categorical_attributes
    }
    zero_shot_prompts = [
        format_instruction(k, v) for k in HELD_OUT_KINDS for v in _ATTRIBUTE_VALUES[k]
    ]
    return {
        "choices": categories,
        "mixtures": color_axes,
        "back": UNDO_TEMPLATE,
        "further": zero_shot_prompts,
    }


def _compute_mixture_weights(attribute: str, value: str, use_mixture: bool) -> dict[str, float]:
    """The least weights that sum to 1 with which the named colours of ``attribute`` mix to ``#rrggbb``, some of them
    negative; of a name, itself, or if ``use_mixture`` the mixture of its colour."""
    table = _ATTRIBUTE_VALUES[attribute]
    color = table.get(value, value) if use_mixture and isinstance(table, dict) else value
    if not color.startswith("#"):
        return {value: 1.0}
    weights = _compute_mixing_matrix(attribute) @ np.append(_parse_rgb(color) / 255, 1)
    return dict(zip(table, weights.tolist(), strict=True))


@cache
def _compute_mixing_matrix(attribute: str) -> np.ndarray:
    """[names, 4]: from red, green, blue and 1 to weights."""
    table = _ATTRIBUTE_VALUES[attribute]
    assert isinstance(table, dict)
    named_colors = np.stack([np.append(_parse_rgb(color) / 255, 1) for color in table.values()])
    return np.linalg.pinv(named_colors.T)


def find_nearest_color(attribute: str, color: str) -> str:
    """The named colour of ``attribute`` that is closest to ``#rrggbb``."""
    table = _ATTRIBUTE_VALUES[attribute]
    assert isinstance(table, dict)
    return min(
        table, key=lambda name: float(np.abs(_parse_rgb(table[name]) - _parse_rgb(color)).sum())
    )


def sample_edit(rng: np.random.Generator, kind: str) -> AttributeEdit:
    """A random edit of this kind, ``HELD_OUT_VALUE`` aside."""
    attribute = kind.removeprefix(CONTINUOUS_PREFIX)
    if kind != attribute:
        before, after = (f"#{r:02x}{g:02x}{b:02x}" for r, g, b in rng.integers(20, 245, (2, 3)))
        return AttributeEdit(attribute, before, after)
    values = [v for v in _ATTRIBUTE_VALUES[kind] if (kind, v) != HELD_OUT_VALUE]
    if kind in _ABSENT_VALUES:
        absent_value = _ABSENT_VALUES[kind]
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
    """One change, or with probability ``two_edit_fraction`` two of kinds that training may see together."""
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
    """Whether both can be seen at once: not two of the same attribute, no hair under a hat, no colours in sepia."""
    attributes = {
        first_kind.removeprefix(CONTINUOUS_PREFIX),
        second_kind.removeprefix(CONTINUOUS_PREFIX),
    }
    conflicting = ({"hat", "hair"}, {"hat", "hair_color"}, {"glasses", "eyes"})
    return len(attributes) == 2 and attributes not in conflicting and "style" not in attributes


def make_pair(portrait: Portrait, edits: tuple[AttributeEdit, ...]) -> AvatarPair:
    """The changes on one person, in a scene that shows them."""
    person, scene = _make_visible(portrait, {c.attribute for c in edits})
    before, after = {c.attribute: c.before for c in edits}, {c.attribute: c.after for c in edits}
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
    """The ``edit_index``-th change of a split, on ``num_identities`` people of their own. Nobody of a split's first 50,000 seeds
    takes part, whom portraits and benchmarks are drawn from."""
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
    person, scene = portrait
    scene = replace(scene, style="plain", tone="plain", hat="none")
    if "eyes" in attributes and "eyes" in list_hidden_attributes(scene):
        scene = replace(scene, glasses="none")
    if "garment_color" in attributes and scene.garment in words.COLORLESS_GARMENTS:
        scene = replace(scene, garment="hoodie")
    return person, scene


def _parse_rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])


EDITABLE_ATTRIBUTES: Final = (
    "glasses",
    "hat",
    "facial_hair",
    "hair_color",
    "hair",
    "expression",
    "eyes",
    "garment",
    "garment_color",
    "background",
    "skin",
    "style",
    "tone",
)
"""Attributes that ``apply_edits`` can change, promptable and identity ones."""
IdentityOrScene = TypeVar("Drawn", AvatarIdentity, Scene)
_RGB_FIELDS = {"hair_color": "hair_rgb", "skin": "skin_rgb", "facial_hair_color": "facial_hair_rgb"}


def apply_edits(person: AvatarIdentity, scene: Scene, **edits: str) -> tuple[AvatarIdentity, Scene]:
    """Person and scene after the named changes, e.g. ``apply_edits(p, s, glasses="sunglasses", style="sepia")``. A colour is
    a name or ``#rrggbb``.

    Raises ``ValueError`` for an attribute that is not in ``EDITABLE_ATTRIBUTES``.
    """
    from data_builder.avatars import vocabulary as words

    for name, value in edits.items():
        if name not in EDITABLE_ATTRIBUTES:
            raise ValueError(f"cannot edit {name!r}; editable: {', '.join(EDITABLE_ATTRIBUTES)}")
        if name in words.PROMPT_ATTRIBUTES or name == "tone":
            scene = _replace_field(scene, name, value)
            continue
        person = _replace_field(person, name, value)
        if name in _RGB_FIELDS:
            color = words.resolve_color(words.SKIN if name == "skin" else words.HAIR_COLOR, value)
            person = _replace_field(
                person, _RGB_FIELDS[name], tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
            )
    return person, scene


def _replace_field(instance: IdentityOrScene, name: str, value: object) -> IdentityOrScene:
    fields: dict[str, Any] = {name: value}
    return replace(instance, **fields)
