"""Before/after pairs of the avatar world: one change (or two), the same on several people, exact in every pixel."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, TypeVar

import numpy as np

from data_builder.avatars import vocabulary as words
from data_builder.avatars.identity import SPLITS, Identity, Scene, hidden, identity, scene
from hyperlora.prompt_blending import reworded, told

Portrait = tuple[Identity, Scene]
BACK: Final = "back to {}"
"""How a LoRA's negative asks for what was before an edit: in other words than those that ask for it as an edit, so that
both can be told apart in one sum."""
EXACT: Final = "exact "
"""What the kinds begin with whose values are any colour, ``#rrggbb``, and no name says which."""
_VALUES: Final = {
    "glasses": words.GLASSES, "hat": words.HAT, "facial_hair": words.FACIAL_HAIR, "hair_color": words.HAIR_COLOR,
    "hair": words.HAIR, "expression": words.EXPRESSION, "eyes": words.EYES, "garment": words.GARMENT,
    "garment_color": words.GARMENT_COLOR, "background": words.BACKGROUND, "skin": words.SKIN, "style": words.STYLE,
    "tone": words.TONE,
}  # fmt: skip
_OPTIONAL: Final = {"glasses": "none", "hat": "none", "facial_hair": "none", "style": "plain", "tone": "plain"}
"""Kinds that are something added (or taken away): one of the two values is this one."""
KINDS: Final = (*_VALUES, *(EXACT + name for name in ("background", "garment_color", "hair_color")))
UNSEEN_KINDS: Final = ("hat", "skin")
"""No network that reads pairs is ever trained on these; the edit base knows them by name."""
UNSEEN_VALUE: Final = ("style", "negative")
"""No edit of any training, not even of the edit base, is this one."""
UNSEEN_TOGETHER: Final = (
    frozenset({"glasses", "background"}), frozenset({"expression", "hair_color"}), frozenset({"garment", "tone"}),
    frozenset({"facial_hair", "garment_color"}),
)  # fmt: skip
"""Attributes that no pair a network is trained on changes at once, though each is seen alone."""


@dataclass(frozen=True)
class Change:
    """``attribute`` goes from ``before`` to ``after``: the same edit on whomever it is made."""

    attribute: str
    before: str
    after: str

    @property
    def kind(self) -> str:
        return EXACT + self.attribute if self.after.startswith("#") else self.attribute

    @property
    def instruction(self) -> str:
        """The edit in words; of an exact colour, the nearest one that has a name."""
        return instruction(self.attribute, self.after)

    def reversed(self) -> "Change":
        return replace(self, before=self.after, after=self.before)


@dataclass(frozen=True)
class Pair:
    """One person ``before`` and ``after`` some changes."""

    before: Portrait
    after: Portrait
    changes: tuple[Change, ...]

    @property
    def instruction(self) -> str:
        return ", ".join(change.instruction for change in self.changes)


def instruction(attribute: str, value: str) -> str:
    """What a user would type to have ``attribute`` become ``value``, in words of the captions."""
    if value.startswith("#"):
        value = nearest(attribute, value)
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


def asked(values: Sequence[tuple[str, str]], mixed: bool = False) -> str:
    """What asks for these values of attributes at once, as ``hyperlora.prompt_blending``: the sum of what asks for each, so that
    words of changes add up as their LoRAs do; of an exact colour, which has no name, a mixture of those that have. With
    ``mixed`` those that have one are mixtures too, as whoever sees a colour cannot know whether it has a name."""
    return told(_prompts(values, mixed))


def undoable(
    values: Sequence[tuple[str, str]], before: Sequence[tuple[str, str]], mixed: bool = False, undo: bool = False
) -> str:
    """``asked``, less what would ask to go ``BACK`` to the values before; with ``undo`` the negative of that, which
    asks for these."""
    way = -1.0 if undo else 1.0
    add = {prompt: way * weight for prompt, weight in _prompts(values, mixed).items()}
    return told(add | {reworded(k, BACK): -way * weight for k, weight in _prompts(before, mixed).items()})


def _prompts(values: Sequence[tuple[str, str]], mixed: bool) -> dict[str, float]:
    """How much of each plain prompt asks for these values."""
    parts: defaultdict[str, float] = defaultdict(float)
    for attribute, value in values:
        for name, weight in _mixture(attribute, value, mixed).items():
            parts[instruction(attribute, name)] += weight
    return parts


def vocabulary() -> dict[str, Any]:
    """What changes that a network may be shown are called, as ``hyperlora.models.instruction_vocabulary`` reads it: one of the
    values of an attribute, or a colour between black, red, green and blue; how to ask for the way back; and what else
    the edit base knows, which no network is shown."""
    corners = ("#000000", "#ff0000", "#00ff00", "#0000ff")
    mixtures = {k: [asked([(k, color)]) for color in corners] for k in _VALUES if EXACT + k in KINDS}
    named = [k for k in _VALUES if k not in mixtures and k not in UNSEEN_KINDS]
    choices = {k: [instruction(k, v) for v in _VALUES[k] if (k, v) != UNSEEN_VALUE] for k in named}
    further = [instruction(k, v) for k in UNSEEN_KINDS for v in _VALUES[k]]
    return {"choices": choices, "mixtures": mixtures, "back": BACK, "further": further}


def _mixture(attribute: str, value: str, mixed: bool) -> dict[str, float]:
    """The least weights that sum to 1 with which the named colours of ``attribute`` mix to ``#rrggbb``, some of them
    negative; of a name, itself, or if ``mixed`` the mixture of its colour."""
    table = _VALUES[attribute]
    color = table.get(value, value) if mixed and isinstance(table, dict) else value
    if not color.startswith("#"):
        return {value: 1.0}
    weights = _mixing(attribute) @ np.append(_rgb(color) / 255, 1)
    return dict(zip(table, weights.tolist(), strict=True))


@cache
def _mixing(attribute: str) -> np.ndarray:
    """[names, 4]: from red, green, blue and 1 to weights."""
    table = _VALUES[attribute]
    assert isinstance(table, dict)
    named = np.stack([np.append(_rgb(color) / 255, 1) for color in table.values()])
    return np.linalg.pinv(named.T)


def nearest(attribute: str, color: str) -> str:
    """The named colour of ``attribute`` that is closest to ``#rrggbb``."""
    table = _VALUES[attribute]
    assert isinstance(table, dict)
    return min(table, key=lambda name: float(np.abs(_rgb(table[name]) - _rgb(color)).sum()))


def change(rng: np.random.Generator, kind: str) -> Change:
    """A random edit of this kind, ``UNSEEN_VALUE`` aside."""
    attribute = kind.removeprefix(EXACT)
    if kind != attribute:
        before, after = (f"#{r:02x}{g:02x}{b:02x}" for r, g, b in rng.integers(20, 245, (2, 3)))
        return Change(attribute, before, after)
    values = [v for v in _VALUES[kind] if (kind, v) != UNSEEN_VALUE]
    if kind in _OPTIONAL:
        nothing = _OPTIONAL[kind]
        something = str(rng.choice([v for v in values if v != nothing]))
        before, after = (nothing, something) if rng.random() < 0.7 else (something, nothing)
    else:
        before, after = (str(v) for v in rng.choice(values, 2, replace=False))
    return Change(attribute, before, after)


def changes(rng: np.random.Generator, kinds: tuple[str, ...] = KINDS, two: float = 0.2) -> tuple[Change, ...]:
    """One change, or with probability ``two`` two of kinds that training may see together."""
    first = str(rng.choice(kinds))
    others = [k for k in kinds if _together(first, k) and frozenset({first, k}) not in UNSEEN_TOGETHER]
    if rng.random() >= two or not others:
        return (change(rng, first),)
    return change(rng, first), change(rng, str(rng.choice(others)))


def _together(one: str, other: str) -> bool:
    """Whether both can be seen at once: not two of the same attribute, no hair under a hat, no colours in sepia."""
    attributes = {one.removeprefix(EXACT), other.removeprefix(EXACT)}
    unseen = ({"hat", "hair"}, {"hat", "hair_color"}, {"glasses", "eyes"})
    return len(attributes) == 2 and attributes not in unseen and "style" not in attributes


def pair(portrait: Portrait, made: tuple[Change, ...]) -> Pair:
    """The changes on one person, in a scene that shows them."""
    person, how = _showing(portrait, {c.attribute for c in made})
    before, after = {c.attribute: c.before for c in made}, {c.attribute: c.after for c in made}
    return Pair(edited(person, how, **before), edited(person, how, **after), made)


def pairs_of(split: str, group: int, people: int, kinds: tuple[str, ...] = KINDS, two: float = 0.2) -> list[Pair]:
    """The ``group``-th change of a split, on ``people`` people of their own. Nobody of a split's first 50,000 seeds
    takes part, whom portraits and benchmarks are drawn from."""
    seeds = SPLITS[split]
    made = changes(np.random.default_rng([20261123, seeds.start, group]), kinds, two)
    first = 50_000 + group * people
    return [pair((identity(seed), scene(seed, 0)), made) for seed in seeds[first : first + people]]


def _showing(portrait: Portrait, attributes: set[str]) -> Portrait:
    person, how = portrait
    how = replace(how, style="plain", tone="plain", hat="none")
    if "eyes" in attributes and "eyes" in hidden(how):
        how = replace(how, glasses="none")
    if "garment_color" in attributes and how.garment in words.COLORLESS_GARMENTS:
        how = replace(how, garment="hoodie")
    return person, how


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])


EDITS: Final = (
    "glasses", "hat", "facial_hair", "hair_color", "hair", "expression", "eyes", "garment", "garment_color",
    "background", "skin", "style", "tone",
)  # fmt: skip
"""Attributes that ``edited`` can change, promptable and identity ones."""
Drawn = TypeVar("Drawn", Identity, Scene)
_RGB = {"hair_color": "hair_rgb", "skin": "skin_rgb", "facial_hair_color": "facial_hair_rgb"}


def edited(person: Identity, scene: Scene, **changes: str) -> tuple[Identity, Scene]:
    """Person and scene after the named changes, e.g. ``edited(p, s, glasses="sunglasses", style="sepia")``. A colour is
    a name or ``#rrggbb``.

    Raises ``ValueError`` for an attribute that is not in ``EDITS``.
    """
    from data_builder.avatars import vocabulary as words

    for name, value in changes.items():
        if name not in EDITS:
            raise ValueError(f"cannot edit {name!r}; editable: {', '.join(EDITS)}")
        if name in words.PROMPT_ATTRIBUTES or name == "tone":
            scene = _with(scene, name, value)
            continue
        person = _with(person, name, value)
        if name in _RGB:
            color = words.color(words.SKIN if name == "skin" else words.HAIR_COLOR, value)
            person = _with(person, _RGB[name], tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)))
    return person, scene


def _with(drawn: Drawn, name: str, value: object) -> Drawn:
    changes: dict[str, Any] = {name: value}
    return replace(drawn, **changes)
