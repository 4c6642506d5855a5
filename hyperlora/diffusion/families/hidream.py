"""HiDream-I1 (2505.22705)."""

from typing import Any, Required, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import DenoiserInputs, PipelineFamily, broadcast_timesteps


class HiDreamConditions(Conditions, total=False):
    """Embeddings of n prompts: ``prompt_embeds`` of T5, pooled ones of CLIP, and Llama's."""

    llama_prompt_embeds: Required[Tensor]
    """Hidden states of Llama 3.1 [n, layers, tokens, width]; diffusers' begin with the layers."""


class HiDreamFamily(PipelineFamily):
    """Adapter of HiDream: two CLIP encoders, T5, every layer of Llama, a mixture of experts.

    Routed experts see the tokens of all samples as one list. A LoRA on them, of the preset
    ``attention+mlp``, is therefore one for the whole batch: LoRAs per sample need ``attention``.
    """

    modelspec_name = "hidream-i1"
    denoiser_class_name = "HiDreamImageTransformer2DModel"
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    timestep_input = "timesteps"
    batch_axis_1_inputs = frozenset({"encoder_hidden_states_llama3"})
    batches_branches = True
    negative_branches = (True, False)
    default_guidance_scale = 5.0
    size_multiple = grid_multiple = 2
    attention_pattern = r"(^|\.)attn1\.to_(q|k|v|out)(_t)?$"
    feed_forward_pattern = r"(^|\.)ff_[it]\.((experts\.\d+|shared_experts)\.)?w[123]$"

    @override
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> HiDreamConditions:
        """Encode n prompts with all text encoders."""
        t5_embeds, _, llama_embeds, _, pooled_embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {
            "prompt_embeds": t5_embeds,  # [n, tokens, width]
            "llama_prompt_embeds": llama_embeds.transpose(0, 1),  # [n, layers, tokens, width]
            "pooled_prompt_embeds": pooled_embeds,  # [n, width]
        }

    @override
    def make_prompt_arguments(self, conditions: Conditions) -> dict[str, Tensor]:
        """Make the arguments of the pipeline, which names each text encoder."""
        conditions = cast(HiDreamConditions, conditions)
        return {
            "prompt_embeds_t5": conditions["prompt_embeds"],
            "prompt_embeds_llama3": conditions["llama_prompt_embeds"].transpose(0, 1),
            "pooled_prompt_embeds": conditions["pooled_prompt_embeds"],
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
        conditions = cast(HiDreamConditions, conditions)
        llama_embeds = conditions["llama_prompt_embeds"]
        return {
            "hidden_states": latents,
            # float32 times as the pipeline's own: the latents' dtype would round them
            "timesteps": broadcast_timesteps(timesteps, latents.float()),
            "encoder_hidden_states_t5": conditions["prompt_embeds"],
            # [layers, n, tokens, width]: the only argument whose samples are on axis 1
            "encoder_hidden_states_llama3": llama_embeds.transpose(0, 1),
            "pooled_embeds": conditions["pooled_prompt_embeds"],
        }

    @override
    def read_output(self, output: Any, latents: Tensor) -> Tensor:
        """Turn x_0 - ε into the scheduler's velocity ε - x_0.

        In training mode the transformer returns patches [n, c, max_patches, 4] instead of images.
        """
        if output.shape != latents.shape:
            rows, columns = (side // 2 for side in latents.shape[-2:])
            patches = output[:, :, : rows * columns].unflatten(-1, (2, 2))
            patches = patches.unflatten(2, (rows, columns))  # [n, c, h/2, w/2, 2, 2]
            output = patches.transpose(3, 4).reshape(latents.shape)
        return -output

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
        """Run the transformer with experts that pass gradients on; see ``PipelineFamily``."""
        if torch.is_grad_enabled():
            _enable_expert_gradients(denoiser or self.denoiser)
        return super().predict(
            latents, timesteps, conditions, denoiser=denoiser, guidance_scale=guidance_scale
        )


def _enable_expert_gradients(transformer: nn.Module) -> None:
    """Make routed experts run outside of ``torch.no_grad``, as diffusers does in training mode.

    In evaluation mode their gradients are silently zero. Both modes compute the same sum. The mode
    stays set: a checkpointed block runs again in the backward pass.
    """
    from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

    for module in transformer.modules():
        if isinstance(module, MOEFeedForwardSwiGLU):
            module.training, module._force_inference_output = True, False
