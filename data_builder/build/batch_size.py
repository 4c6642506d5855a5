"""How many subjects a GPU can fit at once: measured with one and with two."""

from dataclasses import replace
from typing import Final

import torch

from data_builder.build.plan import Plan
from data_builder.build.subject_data import class_latents, material
from data_builder.build.trainer import Farm, open_base

MOST: Final = 256
ON_CPU: Final = 16
SHARE: Final = 0.85
"""Of the GPU's memory that may be used: fragments and other programs take some."""


def as_many_as_fit(plan: Plan) -> Plan:
    """``plan`` with as many subjects at once as this machine's GPU holds; 16 without one, where memory is not what
    bounds it."""
    k = ON_CPU
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        k = within(total, *_peaks(plan))
    return replace(plan, recipe=replace(plan.recipe, at_once=min(k, len(plan.rows))))


def within(total: int, one: int, two: int) -> int:
    """How many fit into ``total`` bytes where ``one`` takes so much and ``two`` so much, each further one as much as
    the second; at least 1, at most 256."""
    more = (SHARE * total - one) / max(1, two - one)
    return int(min(MOST, max(1, 1 + more)))


def _peaks(plan: Plan) -> tuple[int, int]:
    """Bytes at the peak of one step with one subject and with two, the longest list of photos first."""
    recipe = replace(plan.recipe, steps=1, every=1)
    base = open_base(recipe)
    latents = class_latents(base, recipe) if recipe.prior_images else None
    farm = Farm(replace(plan, recipe=recipe), base, latents)
    longest = max(plan.rows, key=lambda row: len(row.photos))
    made = material(longest, farm.source, base, recipe)
    peaks = []
    for k in (1, 2):
        torch.cuda.reset_peak_memory_stats()
        farm.fit([longest] * k, [made] * k)
        peaks.append(torch.cuda.max_memory_allocated())
    return peaks[0], peaks[1]
