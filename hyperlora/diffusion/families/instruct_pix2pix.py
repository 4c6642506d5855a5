"""InstructPix2Pix (2211.09800) on Stable Diffusion 1 and on SDXL."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import DenoiserInputs
from hyperlora.diffusion.families.stable_diffusion import StableDiffusionFamily
from hyperlora.diffusion.families.stable_diffusion_xl import StableDiffusionXLFamily
from hyperlora.errors import InvalidArgumentError


class _InputImageChannels(StableDiffusionFamily):
    """The input image enters as further channels of the UNet; guidance has three branches."""

    edits_images = requires_input_image = True
    negative_branches = (False, True, True)
    default_edit_guidance_scale = 1.0  # a LoRA is the whole edit: one forward pass for each step

    @override
    def make_edit_arguments(
        self, images: Tensor, guidance_scale: float, image_guidance_scale: float
    ) -> dict[str, Any]:
        """Make the input images and both scales of guidance."""
        return {
            "image": images,
            "guidance_scale": guidance_scale,
            "image_guidance_scale": image_guidance_scale,
        }

    @override
    def make_inputs(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        guidance_scale: float | None = None,
    ) -> DenoiserInputs:
        """Make the arguments of the UNet; see ``PipelineFamily.make_inputs``.

        The pipeline concatenates latents that are not scaled, so the scale is divided out.
        """
        inputs = super().make_inputs(latents, timesteps, conditions, guidance_scale)
        image_latents = conditions["image_latents"] / self.pipeline.vae.config.scaling_factor
        inputs["sample"] = torch.cat([latents, image_latents.to(latents)], 1)  # [n, 2 c, h, w]
        return inputs

    @override
    def combine_branches(self, model_output: Tensor, guidance_scale: float | None = None) -> Tensor:
        """Apply guidance with two scales (2211.09800, eq. 3).

        ε(∅) + w_I (ε(i) - ε(∅)) + w_T (ε(i, t) - ε(i)), with the image i and the instruction t.

        Args:
            model_output: ε(i, t), ε(i) and ε(∅), concatenated [3 n, ...].
            guidance_scale: w_T, by default that of the running pipeline, as w_I always is.

        Returns:
            The guided prediction [n, ...].
        """
        scale = self._get_guidance_scale(guidance_scale)
        image_scale = float(self.pipeline.image_guidance_scale)
        text_output, image_output, uncond_output = model_output.chunk(3)  # [n, ...] each
        return (
            uncond_output
            + scale * (text_output - image_output)
            + image_scale * (image_output - uncond_output)
        )


class InstructPix2PixFamily(_InputImageChannels):
    """Adapter of InstructPix2Pix on Stable Diffusion 1."""

    @override
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> Conditions:
        """Encode n instructions with CLIP; this pipeline class has the private method alone."""
        return {"prompt_embeds": self.pipeline._encode_prompt(prompts, self.device, 1, False)}


class InstructPix2PixXLFamily(_InputImageChannels, StableDiffusionXLFamily):
    """Adapter of InstructPix2Pix on SDXL; its pipeline keeps its guidance scales to itself."""

    @override
    def make_edit_arguments(
        self, images: Tensor, guidance_scale: float, image_guidance_scale: float
    ) -> dict[str, Any]:
        """Make the input images, which keep their size, and both scales of guidance."""
        height, width = images.shape[-2:]
        arguments = super().make_edit_arguments(images, guidance_scale, image_guidance_scale)
        return {**arguments, "height": height, "width": width}

    @override
    def count_branches(self, num_samples: int) -> int:
        """Refuse: the branches of a call cannot be told."""
        raise InvalidArgumentError(
            f"{type(self.pipeline).__name__} does not tell its guidance scale: AutoLoRA guidance "
            "is not supported on it; merge the LoRA instead"
        )
