"""Pipeline families: one adapter per diffusers pipeline class.

An adapter holds what depends on the class: the architecture name, the encoding of prompts, the
denoiser's conditions besides the prompt embeddings, and the branches of classifier-free guidance.
A further pipeline class needs one more adapter, listed in ``get_pipeline_family``.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hyperlora.diffusion.conditions import PromptConditions
from hyperlora.diffusion.denoiser_calls import get_denoiser

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TextEmbeds = tuple[Tensor, Tensor | None]
"""Prompt embeddings [n, tokens, width] and, where the family has them, pooled ones [n, width]."""


class PipelineFamily:
    """Adapter of text-to-image pipelines with one text encoder and two guidance branches.

    Subclasses override what differs.

    Args:
        pipeline: The diffusers pipeline.
    """

    modelspec_name: ClassVar[str | None] = None
    """Architecture name in modelspec metadata; None where no name is known."""
    edits_images: ClassVar[bool] = False
    """Whether the pipeline edits an input image by an instruction."""

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        self.pipeline = pipeline

    @property
    def architecture(self) -> str:
        """Architecture name in modelspec metadata, or else the name of the pipeline class."""
        return self.modelspec_name or type(self.pipeline).__name__

    @property
    def resolution(self) -> int:
        """Side in pixels of the square images that the denoiser was trained on."""
        _, denoiser = get_denoiser(self.pipeline)
        config: Any = denoiser.config
        return int(config.sample_size * self.pipeline.vae_scale_factor)

    def encode_text(self, prompts: list[str]) -> TextEmbeds:
        """Encode n prompts, without the unconditional branch of guidance."""
        return self.pipeline.encode_prompt(prompts, self.pipeline.device, 1, False)[0], None

    def make_conditions(
        self, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor | None
    ) -> PromptConditions:
        """Make the denoiser's keyword arguments from encoded prompts.

        Args:
            prompt_embeds: Prompt embeddings [n, tokens, width].
            pooled_prompt_embeds: Pooled prompt embeddings [n, width], if the family has them.

        Returns:
            The arguments by name.
        """
        return {"encoder_hidden_states": prompt_embeds}

    def count_branches(self, num_samples: int) -> int:
        """Count the guidance branches along the batch axis of one denoiser call.

        Args:
            num_samples: Batch size of the call.

        Returns:
            1 without classifier-free guidance in this call, else the number of its branches.
        """
        return 2 if self.pipeline.do_classifier_free_guidance and num_samples >= 2 else 1

    def combine_branches(self, model_output: Tensor, guidance_scale: float | None = None) -> Tensor:
        """Apply classifier-free guidance (2207.12598): ε(∅) + w (ε(c) - ε(∅)).

        Args:
            model_output: Predictions of the unconditional and the conditional branch [2 n, ...].
            guidance_scale: w, by default that of the running pipeline.

        Returns:
            The guided prediction [n, ...].
        """
        scale = self._get_guidance_scale(guidance_scale)
        uncond_output, text_output = model_output.chunk(2)  # [n, ...] each
        return uncond_output + scale * (text_output - uncond_output)

    def _get_guidance_scale(self, guidance_scale: float | None) -> float:
        return float(self.pipeline.guidance_scale) if guidance_scale is None else guidance_scale


class StableDiffusionFamily(PipelineFamily):
    """Adapter of Stable Diffusion 1 and 2 (2112.10752)."""

    modelspec_name = "stable-diffusion-v1"


class InstructPix2PixFamily(PipelineFamily):
    """Adapter of InstructPix2Pix (2211.09800): instruction and input image, three branches."""

    modelspec_name = "stable-diffusion-v1"
    edits_images = True

    def encode_text(self, prompts: list[str]) -> TextEmbeds:
        """Encode n instructions; this pipeline class has the private method alone."""
        return self.pipeline._encode_prompt(prompts, self.pipeline.device, 1, False), None

    def count_branches(self, num_samples: int) -> int:
        """Count the branches: text and image, image only, neither; or 1 without guidance."""
        return 3 if super().count_branches(num_samples) > 1 else 1

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


class StableDiffusionXLFamily(PipelineFamily):
    """Adapter of Stable Diffusion XL (2307.01952): also pooled embeddings and image sizes."""

    modelspec_name: ClassVar[str | None] = "stable-diffusion-xl-v1-base"

    def encode_text(self, prompts: list[str]) -> TextEmbeds:
        """Encode n prompts with both text encoders; the second one gives the pooled embeddings."""
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.pipeline.device, do_classifier_free_guidance=False
        )
        return prompt_embeds, pooled_prompt_embeds

    def make_conditions(
        self, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor | None
    ) -> PromptConditions:
        """Make the denoiser's keyword arguments, for an uncropped image of the base's size.

        Args:
            prompt_embeds: Prompt embeddings [n, tokens, width].
            pooled_prompt_embeds: Pooled prompt embeddings [n, width].

        Returns:
            The prompt embeddings and ``added_cond_kwargs``.
        """
        if pooled_prompt_embeds is None:
            return {"encoder_hidden_states": prompt_embeds}
        side = self.resolution
        sizes = [[side, side, 0, 0, side, side]]  # original size, crop offset, target size
        time_ids = torch.tensor(sizes, device=prompt_embeds.device).repeat(len(prompt_embeds), 1)
        return {
            "encoder_hidden_states": prompt_embeds,
            "added_cond_kwargs": {
                "text_embeds": pooled_prompt_embeds,  # [n, width]
                "time_ids": time_ids.to(prompt_embeds),  # [n, 6]
            },
        }


class StableDiffusion3Family(PipelineFamily):
    """Adapter of Stable Diffusion 3 (2403.03206): a transformer with pooled projections."""

    modelspec_name = "stable-diffusion-v3-medium"

    def encode_text(self, prompts: list[str]) -> TextEmbeds:
        """Encode n prompts with all text encoders; the CLIP encoders give the pooled embeddings."""
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.pipeline.device, do_classifier_free_guidance=False
        )
        return prompt_embeds, pooled_prompt_embeds

    def make_conditions(
        self, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor | None
    ) -> PromptConditions:
        """Make the denoiser's keyword arguments from encoded prompts.

        Args:
            prompt_embeds: Prompt embeddings [n, tokens, width].
            pooled_prompt_embeds: Pooled prompt embeddings [n, width].

        Returns:
            The prompt embeddings and ``pooled_projections``.
        """
        if pooled_prompt_embeds is None:
            return {"encoder_hidden_states": prompt_embeds}
        return {
            "encoder_hidden_states": prompt_embeds,
            "pooled_projections": pooled_prompt_embeds,
        }


class FluxFamily(StableDiffusion3Family):
    """Adapter of FLUX.1: its guidance is distilled, so every call has one branch."""

    modelspec_name = "flux-1-dev"

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the pipeline samples by default; the model has none."""
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    def encode_text(self, prompts: list[str]) -> TextEmbeds:
        """Encode n prompts with T5; CLIP gives the pooled embeddings."""
        prompt_embeds, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, None, device=self.pipeline.device
        )
        return prompt_embeds, pooled_prompt_embeds

    def count_branches(self, num_samples: int) -> int:
        """Return 1: the pipeline calls the transformer once per branch."""
        return 1


class OtherFamily(StableDiffusionXLFamily):
    """Adapter of a pipeline class without one of its own: its attributes decide."""

    modelspec_name = None

    def encode_text(self, prompts: list[str]) -> TextEmbeds:
        """Encode n prompts: as SDXL does where there are two text encoders, else as SD 1."""
        if hasattr(self.pipeline, "text_encoder_2"):
            return super().encode_text(prompts)
        return PipelineFamily.encode_text(self, prompts)

    def count_branches(self, num_samples: int) -> int:
        """Count the guidance branches of one call; a class without the property has one."""
        if not getattr(self.pipeline, "do_classifier_free_guidance", False):
            return 1
        return super().count_branches(num_samples)


def get_pipeline_family(pipeline: "DiffusionPipeline") -> PipelineFamily:
    """Return the adapter of a pipeline, chosen by its class."""
    from diffusers import (
        FluxPipeline,
        StableDiffusion3Pipeline,
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

    families: dict[type, type[PipelineFamily]] = {
        StableDiffusionPipeline: StableDiffusionFamily,
        StableDiffusionInstructPix2PixPipeline: InstructPix2PixFamily,
        StableDiffusionXLPipeline: StableDiffusionXLFamily,
        StableDiffusion3Pipeline: StableDiffusion3Family,
        FluxPipeline: FluxFamily,
    }
    for pipeline_class, family in families.items():
        if isinstance(pipeline, pipeline_class):
            return family(pipeline)
    return OtherFamily(pipeline)
