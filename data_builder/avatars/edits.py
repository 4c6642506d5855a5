"""Exact before/after edits: the same person in the same pose with one attribute (or several) changed."""

from dataclasses import replace
from typing import Any, Final, TypeVar

from data_builder.avatars.people import Identity, Scene

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
