"""Edit images with a base that takes an input image, several LoRAs in one batch."""

from collections.abc import Sequence
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.images import to_image, to_tensor
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
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.weights import LoraWeights

BLEND_RANGE: Final = (0.03, 0.08)
"""Range of pixel differences over which the edit mask rises from 0 to 1, as fractions of the range
of a color channel. Chosen on the validation identities."""


@torch.no_grad()
def edit_images(
    base: DiffusionBase,
    images: Sequence[Image.Image] | Tensor,
    lora: LoraWeights | None = None,
    *,
    seeds: Sequence[int],
    instructions: Sequence[str] | str = "",
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    image_guidance_scale: float = 1.0,
    preserve_unedited: bool = False,
    on_step: StepFn | None = None,
) -> list[Image.Image]:
    """Edit each image by a LoRA, an instruction, or both.

    Args:
        base: A base that edits images.
        images: n images, cropped to their center square and resized to the resolution of the base;
            or a tensor [n, 3, h, w] in [0, 1] of that resolution.
        lora: One LoRA for all images, a batch of n with LoRA i for image i, or None.
        seeds: n seeds.
        instructions: One instruction for all images or one for each; a blend of instructions
            (``hyperlora.prompt_blending``) is an instruction, too.
        num_inference_steps: Denoising steps; None for the family's default.
        guidance_scale: Guidance by the instruction in [0, 100]; 1 is none, and a step is one
            forward pass. None for the family's default, which is 1 for InstructPix2Pix.
        image_guidance_scale: Guidance by the input image in [0, 100], of InstructPix2Pix alone.
        preserve_unedited: Whether to restore the input image where the edit changes nothing
            (``blend_edit_region``), at twice the cost. Other programs that load the LoRA file
            do not, and repaint the whole image.
        on_step: Called with the number of each finished step, from 1; with ``preserve_unedited``
            of each of the two passes. It may raise to stop.

    Returns:
        n images at the resolution of the base.

    Raises:
        InvalidArgumentError: The base does not edit images, the numbers of seeds or LoRAs differ
            from that of the images, a seed, the steps or a guidance scale is out of range, or an
            instruction names a LoRA by a tag.
        LayoutMismatchError: The LoRA changes a component that the base lacks.
    """
    check_edit_base(base)
    family = base.family
    scale = guidance_scale
    if scale is None:
        scale = family.default_edit_guidance_scale or family.default_guidance_scale
    check_sampling_inputs(
        base, len(images), lora, seeds, [scale, image_guidance_scale], sample_noun="image"
    )
    check_num_steps(base, num_inference_steps)
    if isinstance(instructions, str):
        instructions = [instructions] * len(images)
    check_no_lora_tags(instructions, "instruction")
    pixels = images if isinstance(images, Tensor) else _stack_images(images, base.resolution)
    image_batch = pixels.to(family.device)  # [n, 3, h, w]

    def sample_edits(lora: LoraWeights | None, instructions: list[str]) -> list[Image.Image]:
        """Sample one edited image per instruction, with or without a LoRA."""
        n = len(image_batch)
        batches = [slice(n)] if family.edits_in_batches else [slice(i, i + 1) for i in range(n)]
        edited: list[Image.Image] = []
        for batch in batches:
            batch_lora = lora[batch] if lora is not None and lora.batch_shape else lora
            texts, image_pixels = instructions[batch], image_batch[batch]
            with inject_base_lora(base, batch_lora):  # also while the text encoder runs
                conditions = base.encode_prompts(texts, images=image_pixels)
                edited += base.pipeline(
                    **family.make_prompt_arguments(conditions),
                    **family.make_edit_arguments(image_pixels, scale, image_guidance_scale),
                    num_inference_steps=num_inference_steps or family.default_num_inference_steps,
                    generator=make_generators(seeds[batch]),
                    **make_step_arguments(base, on_step),
                ).images
        return edited

    edited = sample_edits(lora, list(instructions))
    if not preserve_unedited:
        return edited
    unedited = sample_edits(None, [""] * len(images))
    edited_pixels = _stack_images(edited, base.resolution)  # [n, 3, h, w]
    unedited_pixels = _stack_images(unedited, base.resolution)  # [n, 3, h, w]
    blended = blend_edit_region(pixels.to(edited_pixels), edited_pixels, unedited_pixels)
    return [to_image(image) for image in blended]


def blend_edit_region(images: Tensor, edited: Tensor, unedited: Tensor) -> Tensor:
    """Restore the input image outside the region that an edit changes.

    The edit mask m rises linearly from 0 to 1 with the largest channel difference between
    ``edited`` and ``unedited``; the result is (1 - m) image + m edited.

    Args:
        images: Input images [*batch, 3, h, w] in [0, 1].
        edited: The images after the edit, of the same shape.
        unedited: The result of the base for the same noise without any edit, of the same shape.

    Returns:
        Blended images [*batch, 3, h, w] in [0, 1].
    """
    low, high = BLEND_RANGE
    difference = (edited - unedited).abs().amax(-3, keepdim=True)  # [*batch, 1, h, w]
    edit_mask = ((difference - low) / (high - low)).clamp(0, 1)  # [*batch, 1, h, w]
    return images + edit_mask * (edited - images)


def check_edit_base(base: DiffusionBase) -> None:
    """Raise ``InvalidArgumentError`` unless the base edits images."""
    if not base.family.edits_images:
        raise InvalidArgumentError(
            f"base {base.id!r} is a {type(base.pipeline).__name__}, one that edits images was "
            "expected: give --base an InstructPix2Pix, FLUX.1 Kontext, FLUX.2 or Qwen-Image-Edit "
            "pipeline"
        )


def _stack_images(images: Sequence[Image.Image], resolution: int) -> Tensor:
    """Convert images to a batch [n, 3, resolution, resolution] in [0, 1]."""
    return torch.stack([to_tensor(image, resolution) for image in images])
