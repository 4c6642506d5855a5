"""Guidance with a LoRA: how far to go from the base towards it, and on which branch of classifier-free guidance.

AutoLoRA (2410.03941):  e = ε^{w1} + γ (ε_L^{w2} - ε^{w1})       ε^{w} = ε(∅) + w (ε(c) - ε(∅)), ε_L with the LoRA
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from math import isfinite
from typing import Any

from torch import Tensor, nn

from hyperlora.diffusion.denoiser_calls import (
    DenoiserCall,
    get_denoiser,
    intercept_denoiser,
    predict_per_lora,
)
from hyperlora.diffusion.lora_injection import (
    inject_lora,
    move_to_module,
    split_denoiser,
    split_text_encoders,
)
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.merge import pad_and_stack
from hyperlora.lora.weights import LoraWeights


@contextmanager
def apply_autolora_guidance(
    pipe: Any,
    lora: LoraWeights,
    gamma: float = 1.5,
    *,
    base_scale: float | None = None,
    lora_scale: float | None = None,
) -> Iterator[None]:
    """While open, pictures of ``pipe`` are drawn with AutoLoRA guidance; base and LoRA predict in one forward.

    γ = 0 is the base, 1 the LoRA alone, above 1 goes beyond it, below 1 is more varied. ``base_scale`` (w1) and
    ``lora_scale`` (w2) are the guidance scales of each, by default the pipeline's own. The denoiser answers with e on
    every branch, so that the pipeline's own classifier-free guidance and its rescaling change nothing. Pipelines that
    predict one branch at a time, or have none (FLUX), get ε + γ (ε_L - ε) on each.

    A LoRA of a text encoder acts on the prompt of both predictions: a pipeline encodes it once.

    Raises ``InvalidArgumentError`` for a number that is not finite and, while drawing, for a scale of its own on a pipeline that
    does not predict both branches in one batch.
    """
    for label, value in (("gamma", gamma), ("base_scale", base_scale), ("lora_scale", lora_scale)):
        if value is not None and not isfinite(value):
            raise InvalidArgumentError(f"{label} must be a finite number, got {value}")
    denoiser_name, denoiser = get_denoiser(pipe)
    denoiser_lora = move_to_module(split_denoiser(lora, denoiser_name), denoiser)
    stacked_loras = pad_and_stack([denoiser_lora * 0.0, denoiser_lora])

    def predict_with_guidance(call: DenoiserCall) -> Tensor:
        num_branches = _count_branches(pipe, call)
        if num_branches == 1 and (base_scale, lora_scale) != (None, None):
            raise InvalidArgumentError(
                "separate guidance scales need both branches in one batch: use a guidance scale above 1"
            )
        base_output, lora_output = predict_per_lora(call, {denoiser_name: denoiser}, stacked_loras)
        if num_branches > 1:
            base_output = _apply_classifier_free_guidance(
                pipe, base_output, num_branches, base_scale
            )
            lora_output = _apply_classifier_free_guidance(
                pipe, lora_output, num_branches, lora_scale
            )
        return (base_output + gamma * (lora_output - base_output)).repeat(
            num_branches, *[1] * (call.sample.ndim - 1)
        )

    with ExitStack() as stack:
        for module, text_lora in split_text_encoders(pipe, lora, denoiser_name):
            stack.enter_context(inject_lora(module, text_lora))
        stack.enter_context(intercept_denoiser(pipe, predict_with_guidance))
        yield


@contextmanager
def inject_branch_loras(
    pipe: Any, positive: LoraWeights | None = None, negative: LoraWeights | None = None
) -> Iterator[None]:
    """While open, ``positive`` acts only where the prompt is followed and ``negative`` only on the unconditional branch
    (e.g. a LoRA of a neutral picture, to push its look away). Both in the pipeline's one batched forward.

    Raises ``InvalidArgumentError`` if neither is given; while drawing, if the pipeline does not predict both in one batch.
    """
    loras = [lora for lora in (positive, negative) if lora is not None]
    if not loras:
        raise InvalidArgumentError(
            "on_branches needs a LoRA for the positive or the negative branch, none given"
        )
    denoiser_name, denoiser = get_denoiser(pipe)
    zero_lora = loras[0] * 0.0
    stacked_loras = pad_and_stack(
        [
            move_to_module(
                split_denoiser(zero_lora if lora is None else lora, denoiser_name), denoiser
            )
            for lora in (positive, negative)
        ]
    )
    modules: Mapping[str, nn.Module] = {denoiser_name: denoiser}

    @cache  # the same for every step of a picture
    def select_loras(batch_size: int, num_branches: int) -> LoraWeights:
        text_branch = (
            0 if num_branches == 3 else 1
        )  # [text, image only, unconditional], or [unconditional, text]
        return stacked_loras[
            [int(i * num_branches // batch_size != text_branch) for i in range(batch_size)]
        ]

    def predict_per_branch(call: DenoiserCall) -> Tensor:
        num_branches = _count_branches(pipe, call)
        if num_branches == 1:
            raise InvalidArgumentError(
                "on_branches needs classifier-free guidance in one batch: use a guidance scale above 1"
            )
        with inject_lora(modules, select_loras(len(call.sample), num_branches)):
            return call()

    with intercept_denoiser(pipe, predict_per_branch):
        yield


def _count_branches(pipe: Any, call: DenoiserCall) -> int:
    """Into how many parts the pipeline will split the batch: 3 for InstructPix2Pix, 2 with classifier-free guidance."""
    if not getattr(pipe, "do_classifier_free_guidance", False) or len(call.sample) < 2:
        return 1
    return 3 if hasattr(pipe, "image_guidance_scale") else 2


def _apply_classifier_free_guidance(
    pipe: Any, noise_pred: Tensor, num_branches: int, guidance_scale: float | None
) -> Tensor:
    """Classifier-free guidance as the pipeline does it, [samples / branches, ...]."""
    guidance_scale = float(pipe.guidance_scale) if guidance_scale is None else guidance_scale
    if num_branches == 2:
        noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
        return noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
    noise_pred_text, noise_pred_image, noise_pred_uncond = noise_pred.chunk(3)  # 2211.09800, eq. 3
    return (
        noise_pred_uncond
        + guidance_scale * (noise_pred_text - noise_pred_image)
        + float(pipe.image_guidance_scale) * (noise_pred_image - noise_pred_uncond)
    )
