"""Inputs of a sampling run on a base: what image generation and image editing share."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.weights import LoraWeights
from hyperlora.seeds import validate_seed

MAX_GUIDANCE_SCALE: Final = 100.0
StepFn = Callable[[int], None]
"""Called with the number of a denoising step, from 1."""


def check_sampling_inputs(
    base: DiffusionBase,
    num_samples: int,
    lora: LoraWeights | None,
    seeds: Sequence[int],
    guidance_scales: Sequence[float],
    sample_noun: str = "prompt",
) -> None:
    """Check that the arguments of one sampling run fit together and fit the base.

    Args:
        base: The base that samples.
        num_samples: Prompts, or images to edit.
        lora: One LoRA for all samples, or a batch of one for each.
        seeds: One seed for each sample.
        guidance_scales: Guidance scales, each in [0, 100].
        sample_noun: What a sample is called in error messages.

    Raises:
        InvalidArgumentError: The numbers of seeds or LoRAs differ from ``num_samples``, or a seed
            or a guidance scale is out of range.
    """
    for seed in seeds:
        validate_seed(seed)
    if len(seeds) != num_samples:
        raise InvalidArgumentError(
            f"{num_samples} {sample_noun}s need as many seeds, got {len(seeds)}"
        )
    if lora is not None and lora.batch_shape and len(lora) != num_samples:
        raise InvalidArgumentError(
            f"{num_samples} {sample_noun}s and {len(lora)} LoRAs given: "
            f"one for each {sample_noun}, or one for all"
        )
    if not all(0 <= scale <= MAX_GUIDANCE_SCALE for scale in guidance_scales):  # refuses NaN too
        raise InvalidArgumentError(
            f"guidance between 0 and {MAX_GUIDANCE_SCALE:g} expected, "
            f"got {' and '.join(map(str, guidance_scales))}"
        )


def check_num_steps(base: DiffusionBase, num_inference_steps: int | None) -> None:
    """Check that a sampler can take a number of denoising steps.

    Args:
        base: The base that samples.
        num_inference_steps: Denoising steps; None for the family's default.

    Raises:
        InvalidArgumentError: They are none, or more than the timesteps of the base's training.
    """
    max_steps = int(base.noise_scheduler.config.num_train_timesteps)
    if num_inference_steps is not None and not 1 <= num_inference_steps <= max_steps:
        raise InvalidArgumentError(
            f"1 to {max_steps} denoising steps expected, got {num_inference_steps}"
        )


def inject_base_lora(base: DiffusionBase, lora: LoraWeights | None) -> AbstractContextManager[None]:
    """Inject a LoRA into the components of a base that it changes, within a ``with`` block.

    Args:
        base: The base.
        lora: One LoRA for all samples, a batch of one for each, or None for no change.

    Returns:
        A context manager.
    """
    return nullcontext() if lora is None else base.inject_lora(lora)


def make_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Make one CPU generator per sample, so its noise depends on neither batch nor device."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def make_step_arguments(base: DiffusionBase, on_step: StepFn | None) -> dict[str, Any]:
    """Make the arguments of ``base.pipeline(...)`` that call a function after each step.

    Args:
        base: The base that samples.
        on_step: Called with the number of the step, from 1. None for no arguments.

    Returns:
        Arguments by name.
    """
    if on_step is None:
        return {}
    if "callback_on_step_end" not in inspect.signature(type(base.pipeline).__call__).parameters:
        # InstructPix2Pix on SDXL
        return {"callback": lambda step, timestep, latents: on_step(step + 1), "callback_steps": 1}

    def call_on_step(
        pipeline: object, step: int, timestep: object, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        on_step(step + 1)
        return tensors

    return {"callback_on_step_end": call_on_step}
