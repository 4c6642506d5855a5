"""FLUX.1: dev, schnell and Kontext (2506.15742)."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import (
    DenoiserInputs,
    PipelineFamily,
    broadcast_timesteps,
)
from hyperlora.diffusion.families.packing import pack_patches, unpack_patches
from hyperlora.diffusion.families.positioned_tokens import PositionedTokensFamily


class FluxFamily(PositionedTokensFamily):
    """Adapter of FLUX.1: 2x2 patches as tokens, T5 and CLIP, embedded guidance."""

    modelspec_name = "flux-1-dev"
    denoiser_class_name = "FluxTransformer2DModel"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    adaptable_text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    size_multiple = 2
    attention_pattern = r"(^|\.)attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"
    feed_forward_pattern = (
        r"(^|\.)ff(_context)?\.net\.(0\.proj|2)$"
        r"|^single_transformer_blocks\.\d+\.proj_(mlp|out)$"
    )
    unbatched_inputs = frozenset({"img_ids", "txt_ids"})

    @property
    @override
    def architecture(self) -> str:
        """Architecture name in modelspec metadata; FLUX.1 schnell is told no guidance scale."""
        is_dev = self.modelspec_name == FluxFamily.modelspec_name
        if is_dev and self.denoiser is not None and not self.denoiser.config.guidance_embeds:
            return "flux-1-schnell"
        return self.modelspec_name

    @override
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> Conditions:
        """Encode n prompts with T5; CLIP gives the pooled embeddings."""
        prompt_embeds, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, None, device=self.device
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

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
        num_tokens = prompt_embeds.shape[1]
        return {
            "hidden_states": pack_patches(latents),  # [n, h/2 w/2, 4 c]
            "timestep": broadcast_timesteps(timesteps, latents) / 1000,  # σ
            "guidance": self.make_guidance(latents, guidance_scale),
            "pooled_projections": conditions["pooled_prompt_embeds"],
            "encoder_hidden_states": prompt_embeds,
            "txt_ids": prompt_embeds.new_zeros(num_tokens, 3),  # [tokens, 3]
            "img_ids": make_position_ids(latents),  # [h/2 w/2, 3]
        }

    @override
    def read_output(self, output: Any, latents: Tensor) -> Tensor:
        """Unpack the tokens [n, h/2 w/2, 4 c] of the transformer to [n, c, h, w]."""
        return unpack_patches(output, latents.shape[-2:])


class FluxKontextFamily(FluxFamily):
    """Adapter of FLUX.1 Kontext: the input image follows the noisy latents as further tokens."""

    schedulers = PipelineFamily.schedulers

    modelspec_name = "flux-1-kontext-dev"
    edits_images = True

    @override
    def make_edit_arguments(
        self, images: Tensor, guidance_scale: float, image_guidance_scale: float
    ) -> dict[str, Any]:
        """Make input images that keep their size."""
        height, width = images.shape[-2:]
        size = self.make_size_arguments(width, height)
        return {"image": images, "guidance_scale": guidance_scale, "_auto_resize": False, **size}

    @override
    def make_size_arguments(self, width: int, height: int) -> dict[str, Any]:
        """Make the size, and its area: the pipeline would scale to 1024² pixels."""
        return {"width": width, "height": height, "max_area": width * height}

    @override
    def make_inputs(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        guidance_scale: float | None = None,
    ) -> DenoiserInputs:
        """Make the arguments of the transformer; without ``image_latents`` those of FLUX.1."""
        inputs = super().make_inputs(latents, timesteps, conditions, guidance_scale)
        if "image_latents" in conditions:
            image_latents = conditions["image_latents"].to(latents)  # [n, c, h', w']
            image_tokens = pack_patches(image_latents)  # [n, h'/2 w'/2, 4 c]
            # the first coordinate tells the input image, 1, from the noisy latents, 0
            image_ids = make_position_ids(image_latents, index=1)
            inputs["hidden_states"] = torch.cat([inputs["hidden_states"], image_tokens], 1)
            inputs["img_ids"] = torch.cat([inputs["img_ids"], image_ids])
        return inputs

    @override
    def read_output(self, output: Any, latents: Tensor) -> Tensor:
        """Unpack the tokens of the noisy latents; those of the input image are dropped."""
        height, width = latents.shape[-2:]
        return super().read_output(output[:, : height // 2 * (width // 2)], latents)


def make_position_ids(latents: Tensor, index: int = 0) -> Tensor:
    """Make the position ids of the 2x2 patches of latents.

    Args:
        latents: [n, c, h, w].
        index: 0 for noisy latents, 1 for those of an input image.

    Returns:
        (index, row, column) of each patch [h/2 w/2, 3].
    """
    rows, columns = (side // 2 for side in latents.shape[-2:])
    ids = torch.cartesian_prod(torch.arange(1) + index, torch.arange(rows), torch.arange(columns))
    return ids.to(latents)
