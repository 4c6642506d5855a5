"""Qwen-Image 2.1: text-to-image."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import DenoiserInputs, PipelineFamily, broadcast_timesteps
from hyperlora.diffusion.families.frame_vae import decode_frames, encode_frames


class QwenImage21Family(PipelineFamily):
    """Adapter of Qwen-Image 2.1: one causal sequence of prompt and image, pixels with alpha.

    Guidance calls the transformer once for each branch, so that a call has one branch. The
    pipeline caches keys and values of the prompt between steps. The adapter computes them anew,
    since a LoRA may change them, with the same prediction.

    The pipeline also edits images, but takes no encoded prompts then: the adapter only generates.
    """

    modelspec_name = "Qwen-Image-2.1"
    denoiser_class_name = "QwenImage21Transformer2DModel"
    size_multiple = 2  # a token is one latent position, but a slot for images holds 2 x 2
    attention_pattern = r"(^|\.)attn\.(to_[qkv]|to_out\.0)$"
    feed_forward_pattern = r"(^|\.)img_mlp\.(proj|gate_layer|out)$"
    listed_inputs = frozenset({"img_shapes"})

    @property
    @override
    def resolution(self) -> int:
        """Side in pixels of the images that the pipeline samples by default; the model has none."""
        return 1024

    @override
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> Conditions:
        """Encode n prompts with Qwen3-VL, padded to the longest; ``images`` are not used."""
        prompt_embeds, mask, _ = self.pipeline.encode_prompt(prompts, device=self.device)
        if mask is None:  # nothing is padded
            mask = prompt_embeds.new_ones(prompt_embeds.shape[:2])
        return {"prompt_embeds": prompt_embeds, "prompt_embeds_mask": mask.bool()}

    @override
    def make_prompt_arguments(self, conditions: Conditions) -> dict[str, Tensor]:
        """Make the arguments of the pipeline, without padding that all prompts share."""
        prompt_embeds, mask = _trim_padding(conditions)
        return {"prompt_embeds": prompt_embeds, "prompt_embeds_mask": mask}

    @torch.no_grad()
    @override
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images [n, 3, h, w] in [0, 1], made opaque, to scaled latents."""
        pixels = (images * 2 - 1).to(self.device)  # [n, 3, h, w] in [-1, 1]
        opaque_images = F.pad(pixels, (0, 0, 0, 0, 0, 1), value=1.0)  # alpha: 1
        return encode_frames(self.pipeline.vae, opaque_images)

    @override
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to images [n, 3, h, w] in [0, 1], without alpha."""
        return (decode_frames(self.pipeline.vae, latents)[:, :3] / 2 + 0.5).clamp(0, 1)

    @override
    def make_guidance_arguments(
        self, guidance_scale: float, negative_prompts: list[str]
    ) -> dict[str, Any]:
        """Make scale and prompts of guidance by two calls for each step."""
        return {"true_cfg_scale": guidance_scale, "negative_prompt": negative_prompts}

    @override
    def make_inputs(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        guidance_scale: float | None = None,
    ) -> DenoiserInputs:
        """Make the arguments of the transformer; see ``PipelineFamily.make_inputs``."""
        prompt_embeds, mask = _trim_padding(conditions)
        height, width = latents.shape[-2:]
        text_slots = torch.zeros_like(mask, dtype=torch.bool)
        image_slots = text_slots.new_ones(len(mask), height * width // 4)
        return {
            "hidden_states": latents.flatten(2).mT,  # [n, h w, c]
            "timestep": broadcast_timesteps(timesteps, latents) / 1000,  # σ
            "encoder_hidden_states": prompt_embeds,
            "encoder_hidden_states_mask": None if mask.all() else mask,
            "img_shapes": [[(1, height, width)]] * len(latents),
            "img_mask": torch.cat([text_slots, image_slots], 1),  # [n, tokens + h/2 w/2]
        }

    @override
    def read_output(self, output: Any, latents: Tensor) -> Tensor:
        """Take the image's tokens, which follow the prompt's, as [n, c, h, w]."""
        return output[:, -latents[0, 0].numel() :].mT.reshape(latents.shape)


def _trim_padding(conditions: Conditions) -> tuple[Tensor, Tensor]:
    """Drop padding that all prompts share, and return embeddings and mask of integers.

    The image's rotary position follows the padded prompt: further padding would move it.
    """
    mask = conditions["prompt_embeds_mask"]
    num_tokens = int(mask.sum(1).max())
    return conditions["prompt_embeds"][:, :num_tokens], mask[:, :num_tokens].long()
