from collections.abc import Callable
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.refine import refine
from hyperlora.finetuning.refine_identity import refine_identity
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase

RefineMethod = Literal["identity", "photos"]
"""What a refined LoRA is held to: who is recognised in its pictures, or the photos by the diffusion loss."""
_CHUNK_SIZE: Final = 4
"""Subjects whose pictures are decoded at once, with all that gradients need of it."""


def refine_predictions(
    model: ImageToLoraBase,
    base: DiffusionBase,
    predicted: LoraWeights,
    photos: Tensor,
    *,
    num_steps: int = 40,
    out_rank: int | None = None,
    method: RefineMethod | None = None,
    progress_label: str | None = None,
    on_step: Callable[[int], None] | None = None,
) -> LoraWeights:
    """``method`` who the model's ``sample_identity`` recognises in pictures of the ``scenes`` that its card names, or by the
    ``load_photos`` themselves; if not given, the former wherever the model has an identity. Other arguments as those of
    ``refine``.

    Raises ``InvalidArgumentError`` as ``check_refine_method`` does."""
    check_refine_method(model, method)
    prompt = f"a portrait of {model.trigger_phrase}"
    if model.identity_embedder is None or method == "photos":
        return refine(
            base,
            predicted,
            photos,
            num_steps=num_steps,
            out_rank=out_rank,
            prompt=prompt,
            progress_label=progress_label,
            on_step=on_step,
        )
    prompts = [
        ", ".join(filter(None, (prompt, scene))) for scene in model.card.get("scenes") or [""] * 8
    ]
    refined_chunks = [
        refine_identity(
            base,
            predicted[indices],
            photos[indices],
            model.identity_embedder,
            prompts,
            num_steps=num_steps,
            out_rank=out_rank,
            progress_label=progress_label,
            on_step=on_step,
        )
        for indices in torch.arange(len(photos)).split(_CHUNK_SIZE)
    ]
    return LoraWeights.unflatten(
        refined_chunks[0].layout, torch.cat([part.flatten() for part in refined_chunks])
    )


def check_refine_method(model: ImageToLoraBase, method: str | None) -> None:
    """Raise ``InvalidArgumentError`` for an unknown way to refine, and for one that needs an identity where there is none."""
    if method is not None and method not in get_args(RefineMethod):
        raise InvalidArgumentError(
            f"unknown way to refine {method!r}; known: {', '.join(get_args(RefineMethod))}"
        )
    if method == "identity" and model.identity_embedder is None:
        raise InvalidArgumentError(
            "this model cannot recognise anyone (it has no identity.safetensors): refine by photos"
        )
