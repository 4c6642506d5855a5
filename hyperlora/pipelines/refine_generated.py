from collections.abc import Callable
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import Base
from hyperlora.errors import BadRequest
from hyperlora.finetuning.refine import refine
from hyperlora.finetuning.refine_identity import refine_identity
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora_base import PhotoModel

RefineBy = Literal["identity", "photos"]
"""What a refined LoRA is held to: who is recognised in its pictures, or the photos by the diffusion loss."""
_TOGETHER: Final = 4
"""Subjects whose pictures are decoded at once, with all that gradients need of it."""


def refined(
    model: PhotoModel,
    base: Base,
    predicted: LoraWeights,
    photos: Tensor,
    *,
    steps: int = 40,
    out_rank: int | None = None,
    by: RefineBy | None = None,
    label: str | None = None,
    watch: Callable[[int], None] | None = None,
) -> LoraWeights:
    """``by`` who the model's ``identity`` recognises in pictures of the ``scenes`` that its card names, or by the
    ``photos`` themselves; if not given, the former wherever the model has an identity. Other arguments as those of
    ``refine``.

    Raises ``BadRequest`` as ``require_refining`` does."""
    require_refining(model, by)
    prompt = f"a portrait of {model.trigger}"
    if model.identity is None or by == "photos":
        return refine(
            base, predicted, photos, steps=steps, out_rank=out_rank, prompt=prompt, label=label, watch=watch
        )  # fmt: skip
    prompts = [", ".join(filter(None, (prompt, scene))) for scene in model.card.get("scenes") or [""] * 8]
    parts = [
        refine_identity(
            base, predicted[some], photos[some], model.identity, prompts, steps=steps, out_rank=out_rank, label=label,
            watch=watch,
        )
        for some in torch.arange(len(photos)).split(_TOGETHER)
    ]  # fmt: skip
    return LoraWeights.unflatten(parts[0].layout, torch.cat([part.flatten() for part in parts]))


def require_refining(model: PhotoModel, by: str | None) -> None:
    """Raise ``BadRequest`` for an unknown way to refine, and for one that needs an identity where there is none."""
    if by is not None and by not in get_args(RefineBy):
        raise BadRequest(f"unknown way to refine {by!r}; known: {', '.join(get_args(RefineBy))}")
    if by == "identity" and model.identity is None:
        raise BadRequest("this model cannot recognise anyone (it has no identity.safetensors): refine by photos")
