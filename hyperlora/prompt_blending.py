"""Blends of prompts, written as compel writes them: ``("blue clothes", "red clothes").format_blend(0.3, 0.7)``.

A denoiser that is shown the weighted sum of their embeddings is told something between them, or, by weights below 0,
beyond: what no word says.
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
"""Parts that weigh less are left out."""


def format_blend(prompt_weights: Mapping[str, float]) -> str:
    """The prompt that asks for these prompts, each by its weight; one prompt of weight 1 is written as it is."""
    nonzero_weights = {
        prompt: weight for prompt, weight in prompt_weights.items() if abs(weight) >= _MIN_WEIGHT
    }
    if len(nonzero_weights) == 1 and abs(sum(nonzero_weights.values()) - 1) < _MIN_WEIGHT:
        return next(iter(nonzero_weights))
    prompts = ", ".join(json.dumps(prompt, ensure_ascii=False) for prompt in nonzero_weights)
    return f"({prompts}).blend({', '.join(f'{weight:.4f}' for weight in nonzero_weights.values())})"


def parse_blend(prompt: str) -> dict[str, float]:
    """What a prompt is blended of; a plain prompt of itself.

    Raises ``InvalidArgumentError`` for a blend that cannot be read.
    """
    if not _BLEND_PATTERN.match(prompt):
        return {prompt: 1.0}
    prompts_text, _, weights_text = prompt.rpartition(".blend")
    try:
        prompts, weights = (
            ast.literal_eval(prompts_text),
            ast.literal_eval(f"[{weights_text.strip()[1:-1]}]"),
        )
        prompt_tuple = prompts if isinstance(prompts, tuple) else (prompts,)
        prompt_weights: defaultdict[str, float] = defaultdict(float)
        for sub_prompt, weight in zip(prompt_tuple, weights, strict=True):
            prompt_weights[str(sub_prompt)] += float(weight)
        if not all(map(isfinite, prompt_weights.values())):
            raise ValueError
        return dict(prompt_weights)
    except (SyntaxError, ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        raise InvalidArgumentError(
            f'the blend {prompt!r} cannot be read: write ("one prompt", "another").blend(0.3, 0.7), a number for each'
        ) from None


def apply_prompt_template(prompt: str, template: str) -> str:
    """The prompt with each part that says something in the place of ``{}`` of ``template``.

    Raises ``InvalidArgumentError`` for a pattern without.
    """
    if "{}" not in template:
        raise InvalidArgumentError(
            f"the pattern {template!r} has no place for a prompt: write {{}} where it goes"
        )
    return format_blend(
        {
            template.replace("{}", sub_prompt) if sub_prompt else sub_prompt: weight
            for sub_prompt, weight in parse_blend(prompt).items()
        }
    )


def combine_blends(blend_weights: Mapping[str, float]) -> str:
    """The blend that asks for each of these prompts (or blends) by its weight, below 0 for less of it, and for nothing
    else: the empty prompt makes up what is missing to a whole."""
    prompt_weights: defaultdict[str, float] = defaultdict(float)
    for prompt, weight in blend_weights.items():
        for sub_prompt, sub_weight in parse_blend(prompt).items():
            prompt_weights[sub_prompt] += weight * sub_weight
    prompt_weights[""] += 1 - sum(prompt_weights.values())
    return format_blend(prompt_weights)


def compute_blend_matrix(prompts: Sequence[str]) -> tuple[list[str], list[list[float]]]:
    """The plain prompts that all of these are blended of, and how much of each is in each [prompts][plain]."""
    parsed_blends = [parse_blend(prompt) for prompt in prompts]
    unique_prompts = list(
        dict.fromkeys(
            sub_prompt for prompt_weights in parsed_blends for sub_prompt in prompt_weights
        )
    )
    return unique_prompts, [
        [prompt_weights.get(sub_prompt, 0.0) for sub_prompt in unique_prompts]
        for prompt_weights in parsed_blends
    ]
