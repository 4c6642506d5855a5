"""Make edits on pictures with a base of edits (InstructPix2Pix), several LoRAs in one denoising batch."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from PIL import Image
from torch import Tensor

from hyperlora.adapters import injected
from hyperlora.data import to_tensor
from hyperlora.errors import BadRequest
from hyperlora.lora import LoraWeights
from hyperlora.pipelines.bases import Base


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
) -> list[Image.Image]:
    """Each picture edited by LoRA i (or by the one LoRA for all) and told instruction i, or a blend of several
    (``hyperlora.blends``); the centre square of each, at the base's resolution. ``pictures`` may be a tensor
    [n, 3, h, w] in [0, 1] of that size.

    ``guidance`` (how much more than without words) and ``image_guidance`` (how much closer to the picture) are
    InstructPix2Pix's two scales; at ``guidance`` 1 a step is one forward pass.
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
    modules = {name: base.modules[name] for name in lora.layout.components} if lora is not None else {}
    with injected(modules, lora) if lora is not None else nullcontext():
        return base.pipeline(
            prompt_embeds=base.encode_prompts(texts)["encoder_hidden_states"],
            image=pictures.to(base.pipeline.device),
            num_inference_steps=steps,
            guidance_scale=guidance,
            image_guidance_scale=image_guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images


def require_editing(base: Base) -> None:
    """Raise ``BadRequest`` unless the base is an InstructPix2Pix pipeline."""
    if "InstructPix2Pix" not in type(base.pipeline).__name__:
        raise BadRequest(
            f"base {base.id!r} is a {type(base.pipeline).__name__}, one that edits pictures was expected: give --base "
            f"an InstructPix2Pix pipeline"
        )
