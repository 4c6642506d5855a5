"""AutoLoRA guidance (2410.03941): extrapolate from the base's prediction towards that of a LoRA.

e = ε^{w1} + γ (ε_L^{w2} - ε^{w1})        ε^{w} = ε(∅) + w (ε(c) - ε(∅)), ε_L with the LoRA
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import isfinite
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hyperlora.diffusion.denoiser_calls import (
    DenoiserCall,
    intercept_denoiser,
    predict_per_lora,
)
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
def apply_autolora_guidance(
    pipe: "DiffusionPipeline",
    lora: LoraWeights,
    gamma: float = 1.5,
    *,
    base_scale: float | None = None,
    lora_scale: float | None = None,
) -> Iterator[None]:
    """Sample with AutoLoRA guidance within a ``with`` block.

    Base and LoRA predict in one forward pass. The denoiser returns e on every branch, so the
    pipeline's own classifier-free guidance and guidance rescaling change nothing. Where a call has
    one branch (FLUX, or a guidance scale of 1), it returns ε + γ (ε_L - ε).

    A pipeline encodes its prompt once, so a LoRA of a text encoder acts on both predictions.

    Args:
        pipe: The pipeline.
        lora: The LoRA; no batch axis.
        gamma: γ. 0 is the base, 1 the LoRA; above 1 exceeds the LoRA, below 1 gives more variety.
        base_scale: w1, guidance scale of the base's prediction; by default the pipeline's.
        lora_scale: w2, guidance scale of the LoRA's prediction; by default the pipeline's.

    Yields:
        Nothing.

    Raises:
        InvalidArgumentError: A number is not finite; or, while sampling, ``base_scale`` or
            ``lora_scale`` is given and a call has one branch.
        LayoutMismatchError: The LoRA is for another base.
    """
    for label, value in (("gamma", gamma), ("base_scale", base_scale), ("lora_scale", lora_scale)):
        if value is not None and not isfinite(value):
            raise InvalidArgumentError(f"{label} must be a finite number, got {value}")
    family = get_pipeline_family(pipe)
    modules: Mapping[str, nn.Module] = {family.denoiser_name: family.denoiser}
    denoiser_loras = split_denoiser(family, [lora])
    stacked_loras = (
        pad_and_stack([denoiser_loras[0] * 0.0, *denoiser_loras])  # [2]: base, LoRA
        if denoiser_loras
        else None
    )

    def predict_with_guidance(call: DenoiserCall) -> Tensor:
        """Predict e, once for each guidance branch [branches * n, c, h, w]."""
        num_branches = family.count_branches(call.num_samples)  # of [branches * n, c, h, w]
        if num_branches == 1 and (base_scale, lora_scale) != (None, None):
            raise InvalidArgumentError(
                "separate guidance scales need both branches in one batch: "
                "use a guidance scale above 1"
            )
        # ε and ε_L, each [branches * n, c, h, w]; equal for a LoRA of text encoders alone
        base_output, lora_output = (
            [call()] * 2
            if stacked_loras is None
            else predict_per_lora(call, modules, stacked_loras)
        )
        # ε^{w} = ε(∅) + w (ε(c) - ε(∅)); without branches, ε and ε_L stand for them
        if num_branches > 1:
            base_output = family.combine_branches(base_output, base_scale)  # ε^{w1} [n, c, h, w]
            lora_output = family.combine_branches(lora_output, lora_scale)  # ε_L^{w2} [n, c, h, w]
        guided_output = base_output + gamma * (lora_output - base_output)  # e [n, c, h, w]
        # equal branches: the pipeline's guidance ε(∅) + w (ε(c) - ε(∅)) gives e for every w
        return guided_output.repeat(num_branches, *[1] * (guided_output.ndim - 1))

    # on the text encoders the LoRA acts at full strength, for any γ
    with ExitStack() as stack:
        for module, text_lora in split_text_encoders(pipe, lora, family.denoiser_name):
            stack.enter_context(inject_lora(module, text_lora))
        stack.enter_context(intercept_denoiser(pipe, predict_with_guidance))
        yield
