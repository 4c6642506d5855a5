"""Guidance with a LoRA: how far to go from the base towards it, and on which branch of classifier-free guidance.

AutoLoRA (2410.03941):  e = ε^{w1} + γ (ε_L^{w2} - ε^{w1})       ε^{w} = ε(∅) + w (ε(c) - ε(∅)), ε_L with the LoRA
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from math import isfinite
from typing import Any

from torch import Tensor, nn

from hyperlora.diffusion.denoiser_calls import Call, caught, denoiser_of, predictions
from hyperlora.diffusion.lora_injection import denoiser_part, injected, on_device, text_parts
from hyperlora.errors import BadRequest
from hyperlora.lora.merge import align
from hyperlora.lora.weights import LoraWeights


@contextmanager
def autolora(
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

    Raises ``BadRequest`` for a number that is not finite and, while drawing, for a scale of its own on a pipeline that
    does not predict both branches in one batch.
    """
    for label, number in (("gamma", gamma), ("base_scale", base_scale), ("lora_scale", lora_scale)):
        if number is not None and not isfinite(number):
            raise BadRequest(f"{label} must be a finite number, got {number}")
    name, denoiser = denoiser_of(pipe)
    on = on_device(denoiser_part(lora, name), denoiser)
    both = align([on * 0.0, on])

    def predict(call: Call) -> Tensor:
        branches = _branches(pipe, call)
        if branches == 1 and (base_scale, lora_scale) != (None, None):
            raise BadRequest("separate guidance scales need both branches in one batch: use a guidance scale above 1")
        base, adapted = predictions(call, {name: denoiser}, both)
        if branches > 1:
            base = _guided(pipe, base, branches, base_scale)
            adapted = _guided(pipe, adapted, branches, lora_scale)
        return (base + gamma * (adapted - base)).repeat(branches, *[1] * (call.sample.ndim - 1))

    with ExitStack() as stack:
        for module, piece in text_parts(pipe, lora, name):
            stack.enter_context(injected(module, piece))
        stack.enter_context(caught(pipe, predict))
        yield


@contextmanager
def on_branches(pipe: Any, positive: LoraWeights | None = None, negative: LoraWeights | None = None) -> Iterator[None]:
    """While open, ``positive`` acts only where the prompt is followed and ``negative`` only on the unconditional branch
    (e.g. a LoRA of a neutral picture, to push its look away). Both in the pipeline's one batched forward.

    Raises ``BadRequest`` if neither is given; while drawing, if the pipeline does not predict both in one batch.
    """
    given = [lora for lora in (positive, negative) if lora is not None]
    if not given:
        raise BadRequest("on_branches needs a LoRA for the positive or the negative branch, none given")
    name, denoiser = denoiser_of(pipe)
    nothing = given[0] * 0.0
    both = align(
        [on_device(denoiser_part(nothing if lora is None else lora, name), denoiser) for lora in (positive, negative)]
    )
    target: Mapping[str, nn.Module] = {name: denoiser}

    @cache  # the same for every step of a picture
    def per_sample(samples: int, branches: int) -> LoraWeights:
        text = 0 if branches == 3 else 1  # [text, image only, unconditional], or [unconditional, text]
        return both[[int(i * branches // samples != text) for i in range(samples)]]

    def predict(call: Call) -> Tensor:
        branches = _branches(pipe, call)
        if branches == 1:
            raise BadRequest("on_branches needs classifier-free guidance in one batch: use a guidance scale above 1")
        with injected(target, per_sample(len(call.sample), branches)):
            return call()

    with caught(pipe, predict):
        yield


def _branches(pipe: Any, call: Call) -> int:
    """Into how many parts the pipeline will split the batch: 3 for InstructPix2Pix, 2 with classifier-free guidance."""
    if not getattr(pipe, "do_classifier_free_guidance", False) or len(call.sample) < 2:
        return 1
    return 3 if hasattr(pipe, "image_guidance_scale") else 2


def _guided(pipe: Any, prediction: Tensor, branches: int, scale: float | None) -> Tensor:
    """Classifier-free guidance as the pipeline does it, [samples / branches, ...]."""
    scale = float(pipe.guidance_scale) if scale is None else scale
    if branches == 2:
        unconditional, text = prediction.chunk(2)
        return unconditional + scale * (text - unconditional)
    text, image, unconditional = prediction.chunk(3)  # 2211.09800, eq. 3
    return unconditional + scale * (text - image) + float(pipe.image_guidance_scale) * (image - unconditional)
