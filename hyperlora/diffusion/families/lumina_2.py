"""Lumina-Image 2.0 (2503.21758)."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import DenoiserInputs, PipelineFamily, broadcast_timesteps


class Lumina2Family(PipelineFamily):
    """Adapter of Lumina 2: Gemma 2 with a system prompt, time that runs upward.

    Guidance calls the transformer once for each branch, so that a call has one branch. The
    pipeline encodes negative prompts without the system prompt, and rescales the guided
    prediction to the norm of the conditional one.
    """

    modelspec_name = "lumina-2"
    denoiser_class_name = "Lumina2Transformer2DModel"
    time_runs_upward = True
    default_guidance_scale = 4.0
    size_multiple = grid_multiple = 2
    attention_pattern = r"(^|\.)attn\.(to_[qkv]|to_out\.0)$"
    feed_forward_pattern = r"\.feed_forward\.linear_[123]$"

    @property
    @override
    def resolution(self) -> int:
        """Side in pixels of the square images that the transformer was trained on."""
        return int(self.pipeline.default_image_size)

    @override
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> Conditions:
        """Encode n prompts with Gemma 2, each after the pipeline's system prompt."""
        prompt_embeds, mask, *_ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device
        )
        return {"prompt_embeds": prompt_embeds, "prompt_embeds_mask": mask.bool()}

    @override
    def make_prompt_arguments(self, conditions: Conditions) -> dict[str, Tensor]:
        """Make the arguments of the pipeline, which names the mask otherwise."""
        return {
            "prompt_embeds": conditions["prompt_embeds"],
            "prompt_attention_mask": conditions["prompt_embeds_mask"].long(),
        }

    @override
    def make_inputs(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        guidance_scale: float | None = None,
    ) -> DenoiserInputs:
        """Make the arguments of the transformer; see ``PipelineFamily.make_inputs``."""
        # float32 times as the pipeline's own: the latents' dtype would round them
        times = broadcast_timesteps(timesteps, latents.float())
        return {
            "hidden_states": latents,
            "timestep": 1 - times / self.pipeline.scheduler.config.num_train_timesteps,  # 1 - σ
            "encoder_hidden_states": conditions["prompt_embeds"],
            "encoder_attention_mask": conditions["prompt_embeds_mask"].long(),
        }

    @override
    def read_output(self, output: Any, latents: Tensor) -> Tensor:
        """Turn x_0 - ε into the scheduler's velocity ε - x_0."""
        return -output
