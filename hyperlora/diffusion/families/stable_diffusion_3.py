"""Stable Diffusion 3 and 3.5 (2403.03206)."""

from torch import Tensor
from typing_extensions import override

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import (
    DenoiserInputs,
    PipelineFamily,
    broadcast_timesteps,
)


class StableDiffusion3Family(PipelineFamily):
    """Adapter of Stable Diffusion 3: an MMDiT, two CLIP encoders and T5."""

    modelspec_name = "stable-diffusion-3-3-medium"
    denoiser_class_name = "SD3Transformer2DModel"
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    adaptable_text_encoders = ("text_encoder", "text_encoder_2")
    schedulers = (
        "FlowMatchEulerDiscrete",
        "FlowMatchHeunDiscrete",
        "FlowMatchLCM",
        "DPMSolverMultistep",
        "UniPCMultistep",
    )
    batches_branches = True
    negative_branches = (True, False)
    size_multiple = grid_multiple = 2
    attention_pattern = r"(^|\.)attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"
    feed_forward_pattern = r"(^|\.)ff(_context)?\.net\.(0\.proj|2)$"

    @property
    @override
    def architecture(self) -> str:
        """Architecture name in modelspec metadata, told apart as kohya's trainer does."""
        config = self.denoiser.config if self.denoiser is not None else None
        if config is None or config.qk_norm is None:
            return self.modelspec_name
        size = "medium" if config.dual_attention_layers else "large"
        return f"stable-diffusion-3-3-5-{size}"

    @override
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> Conditions:
        """Encode n prompts with all text encoders; the CLIP encoders give the pooled embeddings."""
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False
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
        return {
            "hidden_states": latents,
            # float32 times as the pipeline's own: the latents' dtype would round them
            "timestep": broadcast_timesteps(timesteps, latents.float()),
            "encoder_hidden_states": conditions["prompt_embeds"],
            "pooled_projections": conditions["pooled_prompt_embeds"],
        }
