"""How many subjects a GPU can fit at once: measured with one and with two."""

from dataclasses import replace
from typing import Final

import torch

from data_builder.build.plan import Plan
from data_builder.build.subject_data import load_subject, sample_class_latents
from data_builder.build.trainer import ChunkTrainer, load_recipe_base

MAX_BATCH_SIZE: Final = 256
CPU_BATCH_SIZE: Final = 16
MEMORY_FRACTION: Final = 0.85
"""Of the GPU's memory that may be used: fragments and other programs take some."""


def scale_batch_size(plan: Plan) -> Plan:
    """``plan`` with as many subjects at once as this machine's GPU holds; 16 without one, where memory is not what
    bounds it."""
    batch_size = CPU_BATCH_SIZE
    if torch.cuda.is_available():
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        batch_size = compute_max_batch_size(total_bytes, *_measure_peak_memory(plan))
    return replace(plan, recipe=replace(plan.recipe, at_once=min(batch_size, len(plan.rows))))


def compute_max_batch_size(total_bytes: int, peak_one_bytes: int, peak_two_bytes: int) -> int:
    """How many fit into ``total_bytes`` bytes where ``peak_one_bytes`` takes so much and ``peak_two_bytes`` so much, each further one as much as
    the second; at least 1, at most 256."""
    additional = (MEMORY_FRACTION * total_bytes - peak_one_bytes) / max(
        1, peak_two_bytes - peak_one_bytes
    )
    return int(min(MAX_BATCH_SIZE, max(1, 1 + additional)))


def _measure_peak_memory(plan: Plan) -> tuple[int, int]:
    """Bytes at the peak of one step with one subject and with two, the longest list of photos first."""
    recipe = replace(plan.recipe, steps=1, every=1)
    base = load_recipe_base(recipe)
    latents = sample_class_latents(base, recipe) if recipe.num_class_images else None
    trainer = ChunkTrainer(replace(plan, recipe=recipe), base, latents)
    largest = max(plan.rows, key=lambda row: len(row.photos))
    subject_data = load_subject(largest, trainer.source, base, recipe)
    peak_bytes = []
    for num_subjects in (1, 2):
        torch.cuda.reset_peak_memory_stats()
        trainer.fit_subjects([largest] * num_subjects, [subject_data] * num_subjects)
        peak_bytes.append(torch.cuda.max_memory_allocated())
    return peak_bytes[0], peak_bytes[1]
