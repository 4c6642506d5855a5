"""Make edits on pictures with a base of edits (InstructPix2Pix), several LoRAs in one denoising batch."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.images import to_image, to_tensor
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.diffusion.lora_injection import injected
from hyperlora.errors import BadRequest
from hyperlora.lora.weights import LoraWeights

ALIKE: Final = (0.03, 0.08)
"""What differs by less than the first is not of the edit, by more than the second is; of 1, the largest of a pixel's
colours. Chosen on validation people."""


@torch.no_grad()
def apply_edit(
    base: Base,
    pictures: Sequence[Image.Image] | Tensor,
    lora: LoraWeights | None = None,
    *,
    seeds: Sequence[int],
    instructions: Sequence[str] | str = "",
    steps: int = 20,
    guidance: float = 1.0,
    image_guidance: float = 1.0,
    keep_rest: bool = False,
) -> list[Image.Image]:
    """Each picture edited by LoRA i (or by the one LoRA for all) and told instruction i, or a blend of several
    (``hyperlora.prompt_blending``); the centre square of each, at the base's resolution. ``pictures`` may be a tensor
    [n, 3, h, w] in [0, 1] of that size.

    ``guidance`` (how much more than without words) and ``image_guidance`` (how much closer to the picture) are
    InstructPix2Pix's two scales; at ``guidance`` 1 a step is one forward pass. With ``keep_rest`` what the edit does
    not touch stays the picture's own (``kept``), for as many forward passes again; without, the whole picture is
    repainted, as any program does that loads the LoRA file.
    Raises ``BadRequest`` for a base that edits nothing, and for numbers that do not fit together.
    """
    require_editing(base)
    if len(seeds) != len(pictures):
        raise BadRequest(f"{len(pictures)} pictures need as many seeds, got {len(seeds)}")
    if lora is not None and lora.batch and len(lora) != len(pictures):
        raise BadRequest(f"{len(pictures)} pictures and {len(lora)} LoRAs given: one for each picture, or one for all")
    if not (0 <= guidance <= 100 and 0 <= image_guidance <= 100):  # also refuses NaN
        raise BadRequest(f"guidance between 0 and 100 expected, got {guidance} and {image_guidance}")
    if not isinstance(pictures, Tensor):
        pictures = torch.stack([to_tensor(p, base.resolution) for p in pictures])
    texts = [instructions] * len(pictures) if isinstance(instructions, str) else list(instructions)
    seen = pictures.to(base.pipeline.device)

    def drawn(lora: LoraWeights | None, texts: list[str]) -> list[Image.Image]:
        modules = {name: base.modules[name] for name in lora.layout.components} if lora is not None else {}
        with injected(modules, lora) if lora is not None else nullcontext():
            made: list[Image.Image] = base.pipeline(
                prompt_embeds=base.encode_prompts(texts)["encoder_hidden_states"],
                image=seen,
                num_inference_steps=steps,
                guidance_scale=guidance,
                image_guidance_scale=image_guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            ).images
        return made

    edited = drawn(lora, texts)
    if not keep_rest:
        return edited
    both = (edited, drawn(None, [""] * len(texts)))
    made, untouched = (torch.stack([to_tensor(p, base.resolution) for p in some]) for some in both)
    return [to_image(picture) for picture in kept(pictures.to(made), made, untouched)]


def kept(pictures: Tensor, edited: Tensor, untouched: Tensor) -> Tensor:
    """``edited`` where it differs from ``untouched``, what the base makes of ``pictures`` when it is asked for nothing
    (by the same noise), and ``pictures`` where it does not; all [*batch, 3, h, w] in [0, 1]."""
    least, most = ALIKE
    share = (((edited - untouched).abs().amax(-3, keepdim=True) - least) / (most - least)).clamp(0, 1)
    return pictures + share * (edited - pictures)


def require_editing(base: Base) -> None:
    """Raise ``BadRequest`` unless the base is an InstructPix2Pix pipeline."""
    if "InstructPix2Pix" not in type(base.pipeline).__name__:
        raise BadRequest(
            f"base {base.id!r} is a {type(base.pipeline).__name__}, one that edits pictures was expected: give --base "
            f"an InstructPix2Pix pipeline"
        )
