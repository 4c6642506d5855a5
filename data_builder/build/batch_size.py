"""Choice of the number of subjects that a GPU fits at once, from the memory of one and of two."""

from dataclasses import replace
from typing import Final

import torch

from data_builder.build.plan import Plan
from data_builder.build.subject_data import load_subject, sample_class_latents
from data_builder.build.trainer import ChunkTrainer, load_recipe_base

MAX_BATCH_SIZE: Final = 256
CPU_BATCH_SIZE: Final = 16
MEMORY_FRACTION: Final = 0.85
"""Share of the GPU's memory to use; the rest is for fragmentation and other programs."""


def scale_batch_size(plan: Plan) -> Plan:
    """Set ``subjects_per_batch`` to what this machine's GPU can hold; 16 without a GPU."""
    batch_size = CPU_BATCH_SIZE
    if torch.cuda.is_available():
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        batch_size = compute_max_batch_size(total_bytes, *_measure_peak_memory(plan))
    subjects_per_batch = min(batch_size, len(plan.rows))
    return replace(plan, recipe=replace(plan.recipe, subjects_per_batch=subjects_per_batch))


def compute_max_batch_size(total_bytes: int, peak_one_bytes: int, peak_two_bytes: int) -> int:
    """Compute how many subjects fit into the GPU's memory, if each further one needs as much as the
    second.

    Args:
        total_bytes: Memory of the GPU.
        peak_one_bytes: Peak memory of a step with one subject.
        peak_two_bytes: Peak memory of a step with two subjects.

    Returns:
        Number of subjects, 1 to ``MAX_BATCH_SIZE``.
    """
    bytes_per_subject = max(1, peak_two_bytes - peak_one_bytes)
    num_additional = (MEMORY_FRACTION * total_bytes - peak_one_bytes) / bytes_per_subject
    return int(min(MAX_BATCH_SIZE, max(1, 1 + num_additional)))


def _measure_peak_memory(plan: Plan) -> tuple[int, int]:
    """Measure the peak bytes of one step with one and with two of the subject with most photos."""
    recipe = replace(plan.recipe, finetune_steps=1, eval_every=1)
    base = load_recipe_base(recipe)
    class_latents = sample_class_latents(base, recipe) if recipe.num_class_images else None
    trainer = ChunkTrainer(replace(plan, recipe=recipe), base, class_latents)
    largest = max(plan.rows, key=lambda row: len(row.photos))
    subject_data = load_subject(largest, trainer.source, base, recipe)
    peak_bytes = []
    for num_subjects in (1, 2):
        torch.cuda.reset_peak_memory_stats()
        trainer.fit_subjects([largest] * num_subjects, [subject_data] * num_subjects)
        peak_bytes.append(torch.cuda.max_memory_allocated())
    return peak_bytes[0], peak_bytes[1]
