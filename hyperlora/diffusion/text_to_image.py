"""Render prompts with LoRAs on a base, several people in one denoising batch."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from PIL import Image

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.lora.weights import LoraWeights


@torch.no_grad()
def generate_images(
    base: DiffusionBase,
    prompts: Sequence[str],
    lora: LoraWeights | None = None,
    *,
    seeds: Sequence[int],
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    negative_prompt: str = "",
    width: int | None = None,
    height: int | None = None,
) -> list[Image.Image]:
    """One picture per prompt; prompt i with seed i and, if ``generate_malformed_lora`` has a batch axis, LoRA i.

    The starting noise of a picture depends on its seed alone, not on the batch it is rendered in.
    """
    if len(seeds) != len(prompts):
        raise InvalidArgumentError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
    if lora is not None and lora.batch_shape and len(lora) != len(prompts):
        raise InvalidArgumentError(
            f"{len(prompts)} prompts and {len(lora)} LoRAs given: one for each prompt, or one for all"
        )
    if not 0 <= guidance_scale <= 100:  # also refuses NaN
        raise InvalidArgumentError(f"guidance between 0 and 100 expected, got {guidance_scale}")
    if invalid_sides := [
        side for side in (width, height) if side is not None and (side < 8 or side % 8)
    ]:
        raise InvalidArgumentError(
            f"width and height must be multiples of 8 pixels, got {invalid_sides[0]}"
        )
    if lora is not None and (
        missing_components := [n for n in lora.layout.components if n not in base.modules]
    ):
        raise LayoutMismatchError(
            f"the LoRA changes {missing_components[0]}, which base {base.id!r} lacks: use the base it is for"
        )
    modules = (
        {name: base.modules[name] for name in lora.layout.components} if lora is not None else {}
    )
    with inject_lora(modules, lora) if lora is not None else nullcontext():
        return base.pipeline(
            list(prompts),
            negative_prompt=[negative_prompt] * len(prompts),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            width=width or base.resolution,
            height=height or base.resolution,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images
