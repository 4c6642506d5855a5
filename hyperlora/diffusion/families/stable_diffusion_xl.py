"""Stable Diffusion XL (2307.01952)."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import DenoiserInputs
from hyperlora.diffusion.families.stable_diffusion import StableDiffusionFamily


class StableDiffusionXLFamily(StableDiffusionFamily):
    """Adapter of Stable Diffusion XL: two CLIP encoders, pooled embeddings and image sizes."""

    modelspec_name: ClassVar[str] = "stable-diffusion-xl-v1-base"
    text_encoder_names = adaptable_text_encoders = ("text_encoder", "text_encoder_2")

    @property
    @override
    def architecture(self) -> str:
        """Architecture name in modelspec metadata."""
        return self.modelspec_name

    @override
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> Conditions:
        """Encode n prompts with both text encoders; the second one gives the pooled embeddings."""
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
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
        """Make the arguments of the UNet, for uncropped images of the latents' own size."""
        inputs = super().make_inputs(latents, timesteps, conditions, guidance_scale)
        height, width = (side * self.pipeline.vae_scale_factor for side in latents.shape[-2:])
        # original size, crop offset, target size (2307.01952, section 2.2)
        sizes = latents.new_tensor([[height, width, 0, 0, height, width]])
        inputs["added_cond_kwargs"] = {
            "text_embeds": conditions["pooled_prompt_embeds"],  # [n, width]
            "time_ids": sizes.expand(len(latents), -1),  # [n, 6]
        }
        return inputs
