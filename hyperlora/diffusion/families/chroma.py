"""Chroma (lodestones/Chroma1): FLUX.1 schnell without CLIP and without modulation layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import (
    DenoiserInputs,
    PipelineFamily,
    Window,
    broadcast_timesteps,
)
from hyperlora.diffusion.families.flux import FluxFamily, make_position_ids
from hyperlora.diffusion.families.packing import pack_patches


class ChromaFamily(FluxFamily):
    """Adapter of Chroma: FLUX.1 with T5 alone and a mask of the prompt's tokens.

    Guidance calls the transformer once for each branch, so that a call has one branch.

    The mask biases attention and does not exclude padding: diffusers passes it as floats, which
    attention adds to its logits (diffusers issues 12116 and 13619). The adapter does the same.
    """

    modelspec_name = "chroma"
    denoiser_class_name = "ChromaTransformer2DModel"
    text_encoder_names = ("text_encoder",)
    adaptable_text_encoders = ()
    takes_negative_prompts = True
    schedulers = PipelineFamily.schedulers
    default_guidance_scale = 5.0

    @override
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> Conditions:
        """Encode n prompts with T5; the mask also holds the first token of padding."""
        prompt_embeds, _, mask, *_ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": prompt_embeds, "prompt_embeds_mask": mask.bool()}

    @override
    def make_prompt_arguments(self, conditions: Conditions) -> dict[str, Tensor]:
        """Make the arguments of the pipeline; its mask is in the dtype of the embeddings."""
        prompt_embeds = conditions["prompt_embeds"]
        mask = conditions["prompt_embeds_mask"].to(prompt_embeds.dtype)
        return {"prompt_embeds": prompt_embeds, "prompt_attention_mask": mask}

    @override
    def make_guidance_arguments(
        self, guidance_scale: float, negative_prompts: list[str]
    ) -> dict[str, Any]:
        """Make scale and prompts of guidance by two calls for each step."""
        return {"guidance_scale": guidance_scale, "negative_prompt": negative_prompts}

    @override
    def make_inputs(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        guidance_scale: float | None = None,
    ) -> DenoiserInputs:
        """Make the arguments of the transformer; see ``PipelineFamily.make_inputs``."""
        prompt_embeds = conditions["prompt_embeds"]
        return {
            "hidden_states": pack_patches(latents),  # [n, h/2 w/2, 4 c]
            "timestep": broadcast_timesteps(timesteps, latents) / 1000,  # σ
            "encoder_hidden_states": prompt_embeds,
            "txt_ids": prompt_embeds.new_zeros(prompt_embeds.shape[1], 3),  # [tokens, 3]
            "img_ids": make_position_ids(latents),  # [h/2 w/2, 3]
            "attention_mask": _make_mask(latents, conditions),  # [n, tokens + h/2 w/2]
        }

    @override
    def crop_inputs(self, inputs: DenoiserInputs, window: Window) -> DenoiserInputs:
        """Restrict a call to the tokens of a rectangle; the mask loses those outside."""
        cropped = super().crop_inputs(inputs, window)
        num_dropped = inputs["hidden_states"].shape[1] - cropped["hidden_states"].shape[1]
        mask = inputs["attention_mask"]  # [n, tokens + h/2 w/2], all ones for the image
        return {**cropped, "attention_mask": mask[:, : mask.shape[1] - num_dropped]}

    @override
    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        *,
        denoiser: nn.Module | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Run the transformer, with the mask also where it checkpoints; see ``PipelineFamily``."""
        with _mask_checkpointed_blocks(denoiser or self.denoiser, _make_mask(latents, conditions)):
            return super().predict(
                latents, timesteps, conditions, denoiser=denoiser, guidance_scale=guidance_scale
            )


def _make_mask(latents: Tensor, conditions: Conditions) -> Tensor:
    """Make the mask of the prompt's and the image's tokens [n, tokens + h/2 w/2]."""
    mask = conditions["prompt_embeds_mask"].to(conditions["prompt_embeds"].dtype)  # [n, tokens]
    num_patches = latents[0, 0].numel() // 4
    return torch.cat([mask, mask.new_ones(len(mask), num_patches)], 1)


@contextmanager
def _mask_checkpointed_blocks(transformer: Any, mask: Tensor) -> Iterator[None]:  # noqa: ANN401
    """Pass the mask to checkpointed single blocks, which diffusers runs without one.

    Args:
        transformer: A ``ChromaTransformer2DModel``.
        mask: Of all tokens [n, tokens + h/2 w/2].
    """
    if not transformer.is_gradient_checkpointing:
        yield
        return
    checkpoint = transformer._gradient_checkpointing_func
    single_blocks = set(transformer.single_transformer_blocks)

    def run_checkpoint(block: nn.Module, *args: Any) -> Any:  # noqa: ANN401 - of either block
        """Run a block through the original function, which keeps its arguments for backward."""
        return checkpoint(block, *args, *([mask] if block in single_blocks else []))

    transformer._gradient_checkpointing_func = run_checkpoint
    try:
        yield
    finally:
        transformer._gradient_checkpointing_func = checkpoint
