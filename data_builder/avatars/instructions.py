"""Edit prompts of the avatar world: kinds of edits, their values, and the instructions that name
them.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np

from data_builder.avatars import vocabulary
from hyperlora.prompt_blending import apply_prompt_template, combine_blends

UNDO_TEMPLATE: Final = "back to {}"
"""Prompt template of the undo instruction. It differs from the edit instruction, so that one sum
can hold both.
"""
CONTINUOUS_PREFIX: Final = "exact "
"""Prefix of edit kinds whose values are any color ``#rrggbb``, which has no name."""
ATTRIBUTE_VALUES: Final = {
    "glasses": vocabulary.GLASSES,
    "hat": vocabulary.HAT,
    "facial_hair": vocabulary.FACIAL_HAIR,
    "hair_color": vocabulary.HAIR_COLOR,
    "hair": vocabulary.HAIR,
    "expression": vocabulary.EXPRESSION,
    "eyes": vocabulary.EYES,
    "garment": vocabulary.GARMENT,
    "garment_color": vocabulary.GARMENT_COLOR,
    "background": vocabulary.BACKGROUND,
    "skin": vocabulary.SKIN,
    "style": vocabulary.STYLE,
    "tone": vocabulary.TONE,
}
ABSENT_VALUES: Final = {
    "glasses": "none",
    "hat": "none",
    "facial_hair": "none",
    "style": "plain",
    "tone": "plain",
}
"""Value of the attributes that add something to the portrait where nothing is added."""
EDIT_KINDS: Final = (
    *ATTRIBUTE_VALUES,
    *(CONTINUOUS_PREFIX + name for name in ("background", "garment_color", "hair_color")),
)
"""Attributes that pairs edit, then attributes edited to an exact color."""
HELD_OUT_KINDS: Final = ("hat", "skin")
"""Kinds that no pair network is trained on; the edit base knows their instructions."""
HELD_OUT_VALUE: Final = ("style", "negative")
"""Value that no edit of any training uses, not even the edit base's."""
HELD_OUT_COMBINATIONS: Final = (
    frozenset({"glasses", "background"}),
    frozenset({"expression", "hair_color"}),
    frozenset({"garment", "tone"}),
    frozenset({"facial_hair", "garment_color"}),
)
"""Attributes that no training pair of a pair network changes at once, though each is edited alone.
"""


def format_instruction(attribute: str, value: str) -> str:
    """Format the edit prompt that sets an attribute to a value, in the phrases of captions.

    Args:
        attribute: Attribute to edit.
        value: New value, a name or ``#rrggbb``; the latter counts as the nearest color with a name.

    Returns:
        The instruction, e.g. ``wearing sunglasses``.
    """
    if value.startswith("#"):
        value = find_nearest_color(attribute, value)
    is_absent = value == "none"
    match attribute:
        case "glasses":
            return "no glasses" if is_absent else f"wearing {value}"
        case "hat":
            return "no hat" if is_absent else f"wearing a {value}"
        case "facial_hair":
            return "no beard" if is_absent else f"a {value}"
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
    """Compose the prompt blend (``hyperlora.prompt_blending``) that sets several attributes at
    once.

    The blend is the sum of the prompts of each attribute, as LoRAs of edits add up. An exact color
    becomes a mixture of the colors with names.

    Args:
        values: Attributes and their new values.
        use_mixture: Whether colors with names become mixtures too: an image does not show whether
            its color has one.

    Returns:
        The blend as text.
    """
    return combine_blends(_compute_prompt_weights(values, use_mixture))


def compose_instruction_with_undo(
    values: Sequence[tuple[str, str]],
    previous_values: Sequence[tuple[str, str]],
    use_mixture: bool = False,
    undo: bool = False,
) -> str:
    """Compose the blend for ``values`` minus the undo instructions for ``previous_values``.

    Args:
        values: Attributes and their values after the edit.
        previous_values: Attributes and their values before the edit.
        use_mixture: As in ``compose_instruction``.
        undo: Whether to negate the whole blend, which then asks for ``previous_values``.

    Returns:
        The blend as text.
    """
    sign = -1.0 if undo else 1.0
    weights = _compute_prompt_weights(values, use_mixture)
    previous_weights = _compute_prompt_weights(previous_values, use_mixture)
    undo_weights = {
        apply_prompt_template(prompt, UNDO_TEMPLATE): -sign * weight
        for prompt, weight in previous_weights.items()
    }
    return combine_blends({k: sign * weight for k, weight in weights.items()} | undo_weights)


def build_vocabulary() -> dict[str, object]:
    """Build the instruction vocabulary of the edits that pair networks are trained on.

    Returns:
        The JSON object that ``hyperlora.models.instruction_vocabulary`` reads.

        * ``categories``: prompts of each categorical attribute.
        * ``color_axes``: prompts for black, red, green and blue of each color attribute.
        * ``undo_template``: template of the undo instruction.
        * ``zero_shot_prompts``: prompts of the held-out kinds, which only the edit base knows.
    """
    corners = ("#000000", "#ff0000", "#00ff00", "#0000ff")
    color_axes = {
        k: [compose_instruction([(k, color)]) for color in corners]
        for k in ATTRIBUTE_VALUES
        if CONTINUOUS_PREFIX + k in EDIT_KINDS
    }
    categorical_attributes = [
        k for k in ATTRIBUTE_VALUES if k not in color_axes and k not in HELD_OUT_KINDS
    ]
    categories = {
        k: [format_instruction(k, v) for v in ATTRIBUTE_VALUES[k] if (k, v) != HELD_OUT_VALUE]
        for k in categorical_attributes
    }
    zero_shot_prompts = [
        format_instruction(k, v) for k in HELD_OUT_KINDS for v in ATTRIBUTE_VALUES[k]
    ]
    return {
        "categories": categories,
        "color_axes": color_axes,
        "undo_template": UNDO_TEMPLATE,
        "zero_shot_prompts": zero_shot_prompts,
    }


def _compute_prompt_weights(
    values: Sequence[tuple[str, str]], use_mixture: bool
) -> dict[str, float]:
    """Weight of each plain prompt in the blend that sets these values."""
    prompt_weights: defaultdict[str, float] = defaultdict(float)
    for attribute, value in values:
        for name, weight in _compute_mixture_weights(attribute, value, use_mixture).items():
            prompt_weights[format_instruction(attribute, name)] += weight
    return prompt_weights


def _compute_mixture_weights(attribute: str, value: str, use_mixture: bool) -> dict[str, float]:
    """Least-norm weights, which sum to 1, with which the named colors of ``attribute`` mix to
    ``#rrggbb``.

    Weights may be negative. A name has weight 1, or with ``use_mixture`` the mixture of its color.
    """
    table = ATTRIBUTE_VALUES[attribute]
    color = table.get(value, value) if use_mixture and isinstance(table, dict) else value
    if not color.startswith("#"):
        return {value: 1.0}
    weights = _compute_mixing_matrix(attribute) @ np.append(_parse_rgb(color) / 255, 1)
    return dict(zip(table, weights.tolist(), strict=True))


@cache
def _compute_mixing_matrix(attribute: str) -> np.ndarray:
    """Pseudo-inverse [names, 4] from (red, green, blue, 1) to mixture weights."""
    table = ATTRIBUTE_VALUES[attribute]
    assert isinstance(table, dict)
    named_colors = np.stack([np.append(_parse_rgb(color) / 255, 1) for color in table.values()])
    return np.linalg.pinv(named_colors.T)


def find_nearest_color(attribute: str, color: str) -> str:
    """Find the named color that is closest to a color (least sum of absolute differences in RGB).

    Args:
        attribute: Color attribute, whose names are searched.
        color: Color as ``#rrggbb``.

    Returns:
        The name.
    """
    table = ATTRIBUTE_VALUES[attribute]
    assert isinstance(table, dict)
    return min(
        table, key=lambda name: float(np.abs(_parse_rgb(table[name]) - _parse_rgb(color)).sum())
    )


def _parse_rgb(color: str) -> np.ndarray:
    """Parse ``#rrggbb`` into an array [3] of 0 to 255."""
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
