"""Krea 2, base and Turbo."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import DenoiserInputs, PipelineFamily, broadcast_timesteps
from hyperlora.diffusion.families.frame_vae import decode_frames, encode_frames
from hyperlora.diffusion.families.packing import pack_patches, unpack_patches


class Krea2Family(PipelineFamily):
    """Adapter of Krea 2: hidden states of several Qwen3-VL layers, a gate in each attention.

    ``prompt_embeds`` holds the layers of a token one after another [n, tokens, layers * width].
    Turbo differs by the pipeline's ``is_distilled`` alone, which the schedule reads.

    Guidance calls the transformer once for each branch, so that a call has one branch. The
    pipeline's scale is that of the literature minus 1: v(c) + w (v(c) - v(∅)).

    The layerwise blocks of the text fusion take no LoRA: their batch axis holds tokens.
    """

    modelspec_name = "Krea-2"
    denoiser_class_name = "Krea2Transformer2DModel"
    size_multiple = 2
    attention_pattern = (
        r"(^|\.)(transformer|refiner)_blocks\.\d+\.attn\.(to_[qkv]|to_gate|to_out\.0)$"
    )
    feed_forward_pattern = r"(^|\.)(transformer|refiner)_blocks\.\d+\.ff\.(gate|up|down)$"
    unbatched_inputs = frozenset({"position_ids"})

    @property
    @override
    def resolution(self) -> int:
        """Side in pixels of the images that the pipeline samples by default; the model has none."""
        return 1024

    @override
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> Conditions:
        """Encode n prompts with Qwen3-VL, padded to a fixed number of tokens."""
        hidden_states, mask = self.pipeline.encode_prompt(prompts, device=self.device)
        # [n, tokens, layers, width] to [n, tokens, layers * width]
        return {"prompt_embeds": hidden_states.flatten(2), "prompt_embeds_mask": mask}

    @override
    def make_prompt_arguments(self, conditions: Conditions) -> dict[str, Tensor]:
        """Make the arguments of the pipeline, with an axis of layers."""
        return {
            "prompt_embeds": self._split_layers(conditions["prompt_embeds"]),
            "prompt_embeds_mask": conditions["prompt_embeds_mask"],
        }

    @torch.no_grad()
    @override
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images [n, 3, h, w] in [0, 1] to scaled latents, the means of the posterior."""
        return encode_frames(self.pipeline.vae, (images * 2 - 1).to(self.device))

    @override
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to images [n, 3, h, w] in [0, 1], differentiably."""
        return (decode_frames(self.pipeline.vae, latents) / 2 + 0.5).clamp(0, 1)

    @override
    def make_guidance_arguments(
        self, guidance_scale: float, negative_prompts: list[str]
    ) -> dict[str, Any]:
        """Make scale and prompts; the pipeline's scale is smaller by 1, and 0 is no guidance."""
        return {"guidance_scale": max(guidance_scale - 1, 0.0), "negative_prompt": negative_prompts}

    @override
    def make_inputs(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        guidance_scale: float | None = None,
    ) -> DenoiserInputs:
        """Make the arguments of the transformer; see ``PipelineFamily.make_inputs``."""
        prompt_embeds = self._split_layers(conditions["prompt_embeds"])
        rows, columns = (side // 2 for side in latents.shape[-2:])
        # divided before the cast, as in the pipeline: bfloat16 would round 0 to 1000 coarsely
        sigmas = timesteps / self.pipeline.scheduler.config.num_train_timesteps
        return {
            "hidden_states": pack_patches(latents),  # [n, h/2 w/2, 4 c]
            "encoder_hidden_states": prompt_embeds,  # [n, tokens, layers, width]
            "timestep": broadcast_timesteps(sigmas, latents),
            "position_ids": self.pipeline.prepare_position_ids(
                prompt_embeds.shape[1], rows, columns, latents.device
            ),  # [tokens + h/2 w/2, 3]
            "encoder_attention_mask": conditions["prompt_embeds_mask"],
        }

    @override
    def read_output(self, output: Any, latents: Tensor) -> Tensor:
        """Unpack the tokens [n, h/2 w/2, 4 c] of the transformer to [n, c, h, w]."""
        return unpack_patches(output, latents.shape[-2:])

    def _split_layers(self, prompt_embeds: Tensor) -> Tensor:
        """Split [n, tokens, layers * width] into [n, tokens, layers, width]."""
        return prompt_embeds.unflatten(-1, (self.denoiser.config.num_text_layers, -1))
