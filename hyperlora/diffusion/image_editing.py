"""Make edits on pictures with a base of edits (InstructPix2Pix), several LoRAs in one denoising batch."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.images import to_image, to_tensor
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.weights import LoraWeights

BLEND_RANGE: Final = (0.03, 0.08)
"""What differs by less than the first is not of the edit, by more than the second is; of 1, the largest of a pixel's
colours. Chosen on validation people."""


@torch.no_grad()
def edit_images(
    base: DiffusionBase,
    images: Sequence[Image.Image] | Tensor,
    lora: LoraWeights | None = None,
    *,
    seeds: Sequence[int],
    instructions: Sequence[str] | str = "",
    num_inference_steps: int = 20,
    guidance_scale: float = 1.0,
    image_guidance_scale: float = 1.0,
    preserve_unedited: bool = False,
) -> list[Image.Image]:
    """Each picture edited by LoRA i (or by the one LoRA for all) and told instruction i, or a blend of several
    (``main_callback.prompt_blending``); the centre square of each, at the base's resolution. ``images`` may be a tensor
    [n, 3, h, w] in [0, 1] of that size.

    ``guidance_scale`` (how much more than without words) and ``image_guidance_scale`` (how much closer to the picture) are
    InstructPix2Pix's two scales; at ``guidance_scale`` 1 a step is one forward pass. With ``preserve_unedited`` what the edit does
    not touch stays the picture's own (``blend_edit_region``), for as many forward passes again; without, the whole picture is
    repainted, as any program does that loads the LoRA file.
    Raises ``InvalidArgumentError`` for a base that edits nothing, and for numbers that do not fit together.
    """
    check_edit_base(base)
    if len(seeds) != len(images):
        raise InvalidArgumentError(f"{len(images)} pictures need as many seeds, got {len(seeds)}")
    if lora is not None and lora.batch_shape and len(lora) != len(images):
        raise InvalidArgumentError(
            f"{len(images)} pictures and {len(lora)} LoRAs given: one for each picture, or one for all"
        )
    if not (0 <= guidance_scale <= 100 and 0 <= image_guidance_scale <= 100):  # also refuses NaN
        raise InvalidArgumentError(
            f"guidance between 0 and 100 expected, got {guidance_scale} and {image_guidance_scale}"
        )
    if not isinstance(images, Tensor):
        images = torch.stack([to_tensor(p, base.resolution) for p in images])
    prompts = [instructions] * len(images) if isinstance(instructions, str) else list(instructions)
    image_batch = images.to(base.pipeline.device)

    def run_pipeline(lora: LoraWeights | None, prompts: list[str]) -> list[Image.Image]:
        modules = (
            {name: base.modules[name] for name in lora.layout.components}
            if lora is not None
            else {}
        )
        with inject_lora(modules, lora) if lora is not None else nullcontext():
            outputs: list[Image.Image] = base.pipeline(
                prompt_embeds=base.encode_prompts(prompts)["encoder_hidden_states"],
                image=image_batch,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                image_guidance_scale=image_guidance_scale,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            ).images
        return outputs

    edited = run_pipeline(lora, prompts)
    if not preserve_unedited:
        return edited
    passes = (edited, run_pipeline(None, [""] * len(prompts)))
    edited_pixels, unedited_pixels = (
        torch.stack([to_tensor(p, base.resolution) for p in some]) for some in passes
    )
    return [
        to_image(picture)
        for picture in blend_edit_region(images.to(edited_pixels), edited_pixels, unedited_pixels)
    ]


def blend_edit_region(images: Tensor, edited: Tensor, unedited: Tensor) -> Tensor:
    """``apply_edits`` where it differs from ``unedited``, what the base makes of ``images`` when it is asked for nothing
    (by the same noise), and ``images`` where it does not; all [*batch, 3, h, w] in [0, 1]."""
    low, high = BLEND_RANGE
    edit_mask = (((edited - unedited).abs().amax(-3, keepdim=True) - low) / (high - low)).clamp(
        0, 1
    )
    return images + edit_mask * (edited - images)


def check_edit_base(base: DiffusionBase) -> None:
    """Raise ``InvalidArgumentError`` unless the base is an InstructPix2Pix pipeline."""
    if "InstructPix2Pix" not in type(base.pipeline).__name__:
        raise InvalidArgumentError(
            f"base {base.id!r} is a {type(base.pipeline).__name__}, one that edits pictures was expected: give --base "
            f"an InstructPix2Pix pipeline"
        )
