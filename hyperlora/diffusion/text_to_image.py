"""Generate images from prompts with LoRAs on a base, several LoRAs in one batch."""

from collections.abc import Sequence

import torch
from PIL import Image

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.lora_prompt_syntax import check_no_lora_tags
from hyperlora.diffusion.sampling_inputs import (
    StepFn,
    check_num_steps,
    check_sampling_inputs,
    inject_base_lora,
    make_generators,
    make_step_arguments,
)
from hyperlora.diffusion.schedulers import use_scheduler
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.weights import LoraWeights


@torch.no_grad()
def generate_images(  # noqa: PLR0913 - the settings of a sampler
    base: DiffusionBase,
    prompts: Sequence[str],
    lora: LoraWeights | None = None,
    *,
    seeds: Sequence[int],
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    width: int | None = None,
    height: int | None = None,
    scheduler: str | None = None,
    on_step: StepFn | None = None,
) -> list[Image.Image]:
    """Generate one image per prompt.

    The initial noise of an image depends on its seed alone, not on the batch it is sampled in.

    Args:
        base: The base that samples.
        prompts: n prompts.
        lora: One LoRA for all prompts, a batch of n with LoRA i for prompt i, or None.
        seeds: n seeds.
        num_inference_steps: Denoising steps; None for the family's default.
        guidance_scale: Scale of classifier-free guidance in [0, 100], where 1 is none; or the scale
            that a guidance-distilled base is told. None for the family's default.
        negative_prompt: Prompt of the unconditional branch, for all images.
        width: Width in pixels; by default the resolution of the base.
        height: Height in pixels, likewise.
        scheduler: Name of one of ``base.family.schedulers``; None for the base's own.
        on_step: Called with the number of each finished step, from 1. It may raise to stop.

    Returns:
        n images.

    Raises:
        InvalidArgumentError: The numbers of seeds or LoRAs differ from that of the prompts, a
            seed, a size, the steps or the guidance scale is out of range, the scheduler is not for
            the base, a prompt names a LoRA by a tag, or the base takes no negative prompt or
            generates nothing without an input image.
        LayoutMismatchError: The LoRA changes a component that the base lacks.
    """
    base.check_generates_images()
    family = base.family
    scale = family.default_guidance_scale if guidance_scale is None else guidance_scale
    check_sampling_inputs(base, len(prompts), lora, seeds, [scale])
    check_num_steps(base, num_inference_steps)
    check_no_lora_tags(prompts)
    check_no_lora_tags([negative_prompt], "negative prompt")
    multiple = max(8, family.pixel_multiple)
    for side in (width, height):
        if side is not None and (side < multiple or side % multiple):
            raise InvalidArgumentError(
                f"width and height must be multiples of {multiple} pixels, got {side}"
            )
    if negative_prompt and not family.takes_negative_prompts:
        raise InvalidArgumentError(
            f"the guidance of {type(base.pipeline).__name__} is distilled and takes no negative "
            "prompt: leave it out"
        )
    with inject_base_lora(base, lora), use_scheduler(family, scheduler):
        images = base.pipeline(
            prompt=list(prompts),
            num_inference_steps=num_inference_steps or family.default_num_inference_steps,
            generator=make_generators(seeds),
            **family.make_size_arguments(width or base.resolution, height or base.resolution),
            **family.make_guidance_arguments(scale, [negative_prompt] * len(prompts)),
            **make_step_arguments(base, on_step),
        ).images
    return [image.convert("RGB") for image in images]  # Qwen-Image 2.1 decodes alpha, too
