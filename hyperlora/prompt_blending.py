"""Blends of prompts in compel's syntax: ``("blue clothes", "red clothes").blend(0.3, 0.7)``.

The text embeddings of a blend are the weighted sum of those of its prompts. Weights below 0
extrapolate. A blend asks for something between or beyond prompts, for which there is no word.
"""

import ast
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Final

from hyperlora.errors import InvalidArgumentError

_BLEND_PATTERN: Final = re.compile(r"""\(\s*["'].*\)\.blend\(.*\)\s*$""", re.DOTALL)
_MIN_WEIGHT: Final = 1e-4
"""Prompts of smaller weight are left out."""


def format_blend(prompt_weights: Mapping[str, float]) -> str:
    """Format a weighted sum of prompts; a single prompt of weight 1 is returned unchanged."""
    nonzero_weights = {
        prompt: weight for prompt, weight in prompt_weights.items() if abs(weight) >= _MIN_WEIGHT
    }
    if len(nonzero_weights) == 1 and abs(sum(nonzero_weights.values()) - 1) < _MIN_WEIGHT:
        return next(iter(nonzero_weights))
    prompts = ", ".join(json.dumps(prompt, ensure_ascii=False) for prompt in nonzero_weights)
    weights = ", ".join(f"{weight:.4f}" for weight in nonzero_weights.values())
    return f"({prompts}).blend({weights})"


def parse_blend(prompt: str) -> dict[str, float]:
    """Parse a prompt to the weights of its parts.

    Returns:
        The weight of every prompt in the blend; for a plain prompt, 1 for itself.

    Raises:
        InvalidArgumentError: The blend is malformed.
    """
    if not _BLEND_PATTERN.match(prompt):
        return {prompt: 1.0}
    prompts_text, _, weights_text = prompt.rpartition(".blend")
    try:
        prompts = ast.literal_eval(prompts_text)
        weights = ast.literal_eval(f"[{weights_text.strip()[1:-1]}]")
        prompt_tuple = prompts if isinstance(prompts, tuple) else (prompts,)
        prompt_weights: defaultdict[str, float] = defaultdict(float)
        for sub_prompt, weight in zip(prompt_tuple, weights, strict=True):
            prompt_weights[str(sub_prompt)] += float(weight)
        if not all(map(isfinite, prompt_weights.values())):
            raise ValueError
        return dict(prompt_weights)
    except (SyntaxError, ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        raise InvalidArgumentError(
            f"the blend {prompt!r} cannot be read: "
            f'write ("one prompt", "another").blend(0.3, 0.7), a number for each'
        ) from None


def apply_prompt_template(prompt: str, template: str) -> str:
    """Put every non-empty part of a prompt into a template.

    Args:
        prompt: A prompt or a blend.
        template: A prompt with ``{}``, e.g. ``back to {}``.

    Returns:
        The blend of the new parts.

    Raises:
        InvalidArgumentError: The template has no ``{}``, or the blend is malformed.
    """
    if "{}" not in template:
        raise InvalidArgumentError(
            f"the template {template!r} has no place for a prompt: write {{}} where it goes"
        )
    return format_blend(
        {
            template.replace("{}", sub_prompt) if sub_prompt else sub_prompt: weight
            for sub_prompt, weight in parse_blend(prompt).items()
        }
    )


def combine_blends(blend_weights: Mapping[str, float]) -> str:
    """Sum prompts or blends by weights, which may be negative.

    The weight of the empty prompt completes the sum of all weights to 1.

    Returns:
        One blend.

    Raises:
        InvalidArgumentError: A blend is malformed.
    """
    prompt_weights: defaultdict[str, float] = defaultdict(float)
    for prompt, weight in blend_weights.items():
        for sub_prompt, sub_weight in parse_blend(prompt).items():
            prompt_weights[sub_prompt] += weight * sub_weight
    prompt_weights[""] += 1 - sum(prompt_weights.values())
    return format_blend(prompt_weights)


def compute_blend_matrix(prompts: Sequence[str]) -> tuple[list[str], list[list[float]]]:
    """Split prompts into the plain prompts of which they are blends.

    Returns:
        The u unique plain prompts and the weights [prompts, u].

    Raises:
        InvalidArgumentError: A blend is malformed.
    """
    blends = [parse_blend(prompt) for prompt in prompts]
    unique_prompts = list(dict.fromkeys(prompt for blend in blends for prompt in blend))
    matrix = [[blend.get(prompt, 0.0) for prompt in unique_prompts] for blend in blends]
    return unique_prompts, matrix
