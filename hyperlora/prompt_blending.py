"""Blends of prompts, written as compel writes them: ``("blue clothes", "red clothes").blend(0.3, 0.7)``.

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

from hyperlora.errors import BadRequest

_BLEND: Final = re.compile(r"""\(\s*["'].*\)\.blend\(.*\)\s*$""", re.DOTALL)
_LEAST: Final = 1e-4
"""Parts that weigh less are left out."""


def blend(parts: Mapping[str, float]) -> str:
    """The prompt that asks for these prompts, each by its weight; one prompt of weight 1 is written as it is."""
    said = {prompt: weight for prompt, weight in parts.items() if abs(weight) >= _LEAST}
    if len(said) == 1 and abs(sum(said.values()) - 1) < _LEAST:
        return next(iter(said))
    prompts = ", ".join(json.dumps(prompt, ensure_ascii=False) for prompt in said)
    return f"({prompts}).blend({', '.join(f'{weight:.4f}' for weight in said.values())})"


def parts_of(prompt: str) -> dict[str, float]:
    """What a prompt is blended of; a plain prompt of itself.

    Raises ``BadRequest`` for a blend that cannot be read.
    """
    if not _BLEND.match(prompt):
        return {prompt: 1.0}
    told, _, shares = prompt.rpartition(".blend")
    try:
        prompts, weights = ast.literal_eval(told), ast.literal_eval(f"[{shares.strip()[1:-1]}]")
        several = prompts if isinstance(prompts, tuple) else (prompts,)
        parts: defaultdict[str, float] = defaultdict(float)
        for part, weight in zip(several, weights, strict=True):
            parts[str(part)] += float(weight)
        if not all(map(isfinite, parts.values())):
            raise ValueError
        return dict(parts)
    except (SyntaxError, ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        raise BadRequest(
            f'the blend {prompt!r} cannot be read: write ("one prompt", "another").blend(0.3, 0.7), a number for each'
        ) from None


def reworded(prompt: str, pattern: str) -> str:
    """The prompt with each part that says something in the place of ``{}`` of ``pattern``.

    Raises ``BadRequest`` for a pattern without.
    """
    if "{}" not in pattern:
        raise BadRequest(f"the pattern {pattern!r} has no place for a prompt: write {{}} where it goes")
    return blend({pattern.replace("{}", part) if part else part: weight for part, weight in parts_of(prompt).items()})


def told(prompts: Mapping[str, float]) -> str:
    """The blend that asks for each of these prompts (or blends) by its weight, below 0 for less of it, and for nothing
    else: the empty prompt makes up what is missing to a whole."""
    parts: defaultdict[str, float] = defaultdict(float)
    for prompt, weight in prompts.items():
        for part, share in parts_of(prompt).items():
            parts[part] += weight * share
    parts[""] += 1 - sum(parts.values())
    return blend(parts)


def shares(prompts: Sequence[str]) -> tuple[list[str], list[list[float]]]:
    """The plain prompts that all of these are blended of, and how much of each is in each [prompts][plain]."""
    blends = [parts_of(prompt) for prompt in prompts]
    plain = list(dict.fromkeys(part for parts in blends for part in parts))
    return plain, [[parts.get(part, 0.0) for part in plain] for parts in blends]
