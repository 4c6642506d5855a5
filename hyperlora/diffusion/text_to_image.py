"""Generate images from prompts with LoRAs on a base, several LoRAs in one batch."""

from collections.abc import Sequence

import torch
from PIL import Image

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.sampling_inputs import (
    check_sampling_inputs,
    inject_base_lora,
    make_generators,
)
from hyperlora.errors import InvalidArgumentError
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
    """Generate one image per prompt.

    The initial noise of an image depends on its seed alone, not on the batch it is sampled in.

    Args:
        base: The base that samples.
        prompts: n prompts.
        lora: One LoRA for all prompts, a batch of n with LoRA i for prompt i, or None.
        seeds: n seeds.
        num_inference_steps: Denoising steps.
        guidance_scale: Scale of classifier-free guidance in [0, 100].
        negative_prompt: Prompt of the unconditional branch, for all images.
        width: Width in pixels, a multiple of 8; by default the resolution of the base.
        height: Height in pixels, a multiple of 8; by default the resolution of the base.

    Returns:
        n images.

    Raises:
        InvalidArgumentError: The numbers of seeds or LoRAs differ from that of the prompts, or a
            size or the guidance scale is out of range.
        LayoutMismatchError: The LoRA changes a component that the base lacks.
    """
    check_sampling_inputs(base, len(prompts), lora, seeds, [guidance_scale])
    for side in (width, height):
        if side is not None and (side < 8 or side % 8):
            raise InvalidArgumentError(
                f"width and height must be multiples of 8 pixels, got {side}"
            )
    with inject_base_lora(base, lora):
        return base.pipeline(
            list(prompts),
            negative_prompt=[negative_prompt] * len(prompts),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            width=width or base.resolution,
            height=height or base.resolution,
            generator=make_generators(seeds),
        ).images
