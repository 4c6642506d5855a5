"""What tests of families encode, and record of a running pipeline."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hyperlora.diffusion.families.registry import get_pipeline_family
from tests.tiny_pipelines.base import TinyPipeline

WITHOUT_REGIONS = ("krea_2", "krea_2_turbo", "qwen_image_21")
"""Families that do not tell where their tokens lie."""


@torch.no_grad()
def make_conditions(tiny: TinyPipeline) -> Any:
    """Encode the prompts, and the input images where there are some."""
    family = get_pipeline_family(tiny.pipe)
    conditions: Any = family.encode_text(list(tiny.prompts), tiny.images)
    if tiny.images is not None:
        conditions["image_latents"] = family.encode_images(tiny.images)
    return conditions


@contextmanager
def record_batch_sizes(denoiser: nn.Module) -> Iterator[list[int]]:
    """Record the batch size of each call of a transformer, within a ``with`` block."""
    batch_sizes: list[int] = []

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        batch_sizes.append(len(kwargs["hidden_states"]))

    hook = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield batch_sizes
    finally:
        hook.remove()
