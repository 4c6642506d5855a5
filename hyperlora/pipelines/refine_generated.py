"""Refine generated LoRAs, by the identity in their images or by the photos' diffusion loss."""

from collections.abc import Callable
from dataclasses import replace
from typing import Final, get_args

import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.config import RefineConfig
from hyperlora.finetuning.refine import refine_lora
from hyperlora.finetuning.refine_identity import refine_identity
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.config import RefineMethod
from hyperlora.pipelines.photo_model import AnyPhotoModel

_CHUNK_SIZE: Final = 4
"""Subjects whose images are decoded at once: gradients keep every activation of the decoder."""
_NUM_PLAIN_SCENES: Final = 8
"""Images per subject without a scene, for a model whose card lists no scenes."""


def refine_predictions(
    model: AnyPhotoModel,
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
    """Refine the LoRAs that a model generated from photos.

    Args:
        model: The model that generated them.
        base: The base of the LoRAs.
        predicted: One LoRA per subject, batch K.
        photos: [K, views, 3, h, w] in [0, 1], of the base's resolution.
        num_steps: Optimizer steps.
        out_rank: The rank of the result; None for all directions of the refined LoRA.
        method: ``identity`` compares images of the card's scenes with the photos by the model's
            identity embedder, ``photos`` minimizes the diffusion loss on the photos. None takes
            the former where the model has an embedder.
        progress_label: The label of a progress bar; None for no bar.
        on_step: Called with the number of each step, from 1.

    Returns:
        The refined LoRAs, batch K.

    Raises:
        InvalidArgumentError: As ``check_refine_method``.
    """
    check_refine_method(model, method)
    config = replace(
        model.refine_config or RefineConfig(),
        num_steps=num_steps,
        out_rank=out_rank,
        progress_label=progress_label,
        on_step=on_step,
    )
    prompt = model.refine_prompt
    if model.identity_embedder is None or method == "photos":
        return refine_lora(base, predicted, photos, config, prompt=prompt)
    scenes = model.card.scenes or ("",) * _NUM_PLAIN_SCENES
    prompts = [", ".join(filter(None, (prompt, scene))) for scene in scenes]
    refined_chunks = [
        refine_identity(
            base, predicted[indices], photos[indices], model.identity_embedder, prompts, config
        )
        for indices in torch.arange(len(photos)).split(_CHUNK_SIZE)
    ]
    rows = torch.cat([chunk.flatten() for chunk in refined_chunks])  # [K, P]
    return LoraWeights.unflatten(refined_chunks[0].layout, rows)


def check_refine_method(model: AnyPhotoModel, method: str | None) -> None:
    """Check that a model can be refined by a method.

    Args:
        model: The model that generates the LoRAs.
        method: The method; None is always possible.

    Raises:
        InvalidArgumentError: The method is unknown, or needs an identity embedder that the model
            does not have.
    """
    if method is not None and method not in get_args(RefineMethod):
        raise InvalidArgumentError(
            f"unknown refine method {method!r}; known: {', '.join(get_args(RefineMethod))}"
        )
    if method == "identity" and model.identity_embedder is None:
        raise InvalidArgumentError(
            "this model cannot recognize anyone (it has no identity.safetensors): refine by photos"
        )
