"""A LoRA on the positive branch of guidance, and another one or none on the negative branch."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyperlora.diffusion.denoiser_calls import DenoiserCall, intercept_denoiser
from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.diffusion.lora_injection import (
    inject_lora,
    split_denoiser,
    split_text_encoders,
)
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.merge import pad_and_stack
from hyperlora.lora.weights import LoraWeights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@contextmanager
def inject_lora_by_branch(
    pipe: "DiffusionPipeline", lora: LoraWeights, negative_lora: LoraWeights | None = None
) -> Iterator[None]:
    """Sample with one LoRA on the positive branch and another on the negative, in a ``with`` block.

    Guidance leads away from the negative branch. Where that lacks the LoRA, guidance strengthens
    what the LoRA adds, too: ε(∅) + w (ε_L(c) - ε(∅)).

    A pipeline encodes its prompts once, so the text encoders keep the positive LoRA.

    Args:
        pipe: The pipeline.
        lora: LoRA of the positive branch, without a batch axis.
        negative_lora: LoRA of the negative branch, likewise; None for none.

    Yields:
        Nothing.

    Raises:
        LayoutMismatchError: A LoRA is for another base.
        InvalidArgumentError: The negative LoRA changes text encoders alone; or, while sampling, the
            pipeline does not tell its guidance.
    """
    family = get_pipeline_family(pipe)
    name = family.denoiser_name
    if negative_lora is not None and name not in negative_lora.layout.components:
        raise InvalidArgumentError(
            f"the LoRA of the negative branch changes {', '.join(negative_lora.layout.components)} "
            f"alone, but all prompts are encoded with the positive one: use a LoRA of the {name}"
        )
    denoiser_loras = split_denoiser(
        family, [lora] if negative_lora is None else [lora, negative_lora]
    )
    stacked_loras = None  # of a LoRA of text encoders alone, which has no branches
    if denoiser_loras:
        denoiser_loras += [denoiser_loras[0] * 0.0] if negative_lora is None else []
        stacked_loras = pad_and_stack(denoiser_loras)  # [2]
    last_latents: object = None

    def predict_by_branch(call: DenoiserCall) -> Tensor:
        """Predict each branch with its LoRA."""
        nonlocal last_latents
        if stacked_loras is None:
            return call()
        num_branches = family.count_branches(call.num_samples)
        latents = call.inputs[family.latents_input]
        if num_branches > 1:  # one batch: LoRA i for sample i
            indices = torch.tensor(family.negative_branches).long()  # [branches], 1: negative
            repeats = call.num_samples // num_branches
            loras = stacked_loras[indices.repeat_interleave(repeats).tolist()]  # [branches * n]
        else:  # the negative call of a step follows with the same latents
            loras = stacked_loras[int(latents is last_latents)]
        last_latents = latents
        with inject_lora({name: family.denoiser}, loras):
            return call()

    with ExitStack() as stack:
        for module, text_lora in split_text_encoders(pipe, lora, name):
            stack.enter_context(inject_lora(module, text_lora))
        stack.enter_context(intercept_denoiser(pipe, predict_by_branch))
        yield
