"""Base models: any diffusers pipeline with a UNet or a transformer, from a folder or the hub."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from hyperlora.diffusion.conditions import PromptConditions
from hyperlora.diffusion.pipeline_family import (
    PipelineFamily,
    TextEmbeds,
    get_pipeline_family,
)
from hyperlora.encoders.unet_encoder import UNetFeatureEncoder
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.prompt_blending import compute_blend_matrix

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

PromptCache = dict[str, TextEmbeds]
"""Encoded prompts: embeddings [tokens, width] and, for SDXL, pooled embeddings [width]."""
CACHE_SIZE: Final = 1024
"""Prompts in a cache; a cache with more is emptied."""


@dataclass(frozen=True)
class DiffusionBase:
    """A frozen diffusion pipeline with its id.

    Attributes:
        id: The hub id, or the last two parts of a folder's path.
        pipeline: The diffusers pipeline.
    """

    id: str
    pipeline: DiffusionPipeline

    @cached_property
    def family(self) -> PipelineFamily:
        """The adapter of the pipeline class."""
        return get_pipeline_family(self.pipeline)

    @property
    def architecture(self) -> str:
        """Architecture name in modelspec metadata."""
        return self.family.architecture

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Components that can take a LoRA: ``unet`` or ``transformer``, and the text encoders."""
        names = ("unet", "transformer", "text_encoder", "text_encoder_2")
        return {n: m for n in names if isinstance(m := getattr(self.pipeline, n, None), nn.Module)}

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or the transformer."""
        return next(iter(self.modules.values()))

    @property
    def resolution(self) -> int:
        """Side in pixels of the square images that the denoiser was trained on."""
        return self.family.resolution

    @cached_property
    def noise_scheduler(self) -> "SchedulerMixin":
        """The training scheduler of the pipeline's sampler: DDPM or flow matching."""
        config = self.pipeline.scheduler.config
        scheduler_class = (
            DDPMScheduler if "beta_schedule" in config else FlowMatchEulerDiscreteScheduler
        )
        return scheduler_class.from_config(config)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images [n, 3, h, w] in [0, 1] to scaled latents [n, c, h/f, w/f].

        The latents are the means of the posterior.
        """
        vae = self.pipeline.vae
        pixels = (images * 2 - 1).to(vae.device, vae.dtype)  # [n, 3, h, w] in [-1, 1]
        mean = vae.encode(pixels).latent_dist.mean  # [n, c, h/f, w/f]
        return (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode scaled latents [n, c, h/f, w/f] to images [n, 3, h, w] in [0, 1].

        Gradients flow to the latents.
        """
        vae = self.pipeline.vae
        raw = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        return (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)  # [n, 3, h, w]

    @torch.no_grad()
    def encode_prompts(
        self, prompts: list[str], cache: PromptCache | None = None
    ) -> PromptConditions:
        """Encode prompts to the keyword arguments that the denoiser takes for them.

        Args:
            prompts: n prompts, or blends of prompts (``hyperlora.prompt_blending``).
            cache: Filled with the embeddings of the plain prompts, for the next call. Valid only
                while the text encoders, with any LoRAs on them, stay the same.

        Returns:
            ``encoder_hidden_states`` [n, tokens, width] and the further conditions of the pipeline
            family, e.g. ``added_cond_kwargs`` for SDXL.

        Raises:
            InvalidArgumentError: A blend cannot be parsed.
        """
        unique_prompts, blend_weights = compute_blend_matrix(prompts)
        if cache is None and set(unique_prompts) == set(prompts):
            # no blend: each prompt by itself, since sample i must meet LoRA i of the text encoder
            prompt_embeds, pooled_prompt_embeds = self._encode_text(prompts)
        else:
            unique_embeds, unique_pooled_embeds = (
                self._encode_text(unique_prompts)
                if cache is None
                else self._encode_with_cache(unique_prompts, cache)
            )  # [p, tokens, width], [p, width]
            weight_matrix = torch.tensor(blend_weights, device=unique_embeds.device)  # [n, p]
            # embeddings of similar prompts differ by less than half precision resolves
            with torch.autocast(unique_embeds.device.type, enabled=False):
                prompt_embeds = torch.einsum(
                    "np,ptw->ntw", weight_matrix, unique_embeds.float()
                ).to(unique_embeds)  # [n, tokens, width]
                pooled_prompt_embeds = (
                    None
                    if unique_pooled_embeds is None
                    else (weight_matrix @ unique_pooled_embeds.float()).to(unique_pooled_embeds)
                )  # [n, width]
        return self.family.make_conditions(prompt_embeds, pooled_prompt_embeds)

    def _encode_with_cache(self, prompts: list[str], cache: PromptCache) -> TextEmbeds:
        """Encode those of n plain prompts that the cache lacks; stack the embeddings of all."""
        if len(cache) > CACHE_SIZE:
            cache.clear()
        if new_prompts := [prompt for prompt in prompts if prompt not in cache]:
            prompt_embeds, pooled_prompt_embeds = self._encode_text(new_prompts)
            for i, prompt in enumerate(new_prompts):
                pooled_embed = None if pooled_prompt_embeds is None else pooled_prompt_embeds[i]
                cache[prompt] = (prompt_embeds[i], pooled_embed)  # [tokens, width], [width]
        stacked_embeds = torch.stack([cache[prompt][0] for prompt in prompts])
        pooled_embeds = [pool for prompt in prompts if (pool := cache[prompt][1]) is not None]
        return stacked_embeds, torch.stack(pooled_embeds) if pooled_embeds else None

    def _encode_text(self, prompts: list[str]) -> TextEmbeds:
        """Encode n prompts to embeddings [n, tokens, width] and perhaps pooled ones [n, width]."""
        return self.family.encode_text(prompts)


def load_diffusion_base(
    name_or_path: str | Path,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    **pretrained_kwargs: Any,
) -> DiffusionBase:
    """Load a diffusers pipeline in evaluation mode, with all parameters frozen.

    Args:
        name_or_path: Folder of a pipeline, or a hub id.
        dtype: Precision of all components, as a torch dtype or its name, e.g. "bfloat16".
        device: Device of all components.
        pretrained_kwargs: Further arguments of ``DiffusionPipeline.from_pretrained``.

    Returns:
        The base.

    Raises:
        ModelLoadError: The folder holds no diffusers pipeline, or it cannot be loaded.
        InvalidArgumentError: torch has no floating point ``dtype`` of this name.
    """
    dtype = _parse_dtype(dtype)
    folder = Path(name_or_path)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ModelLoadError(
            f"{folder} is no diffusers pipeline: model_index.json expected, none found; give --base"
        )
    logging.disable_progress_bar()  # "Loading pipeline components" is no news to a user
    transformers_logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            name_or_path, dtype=dtype, **pretrained_kwargs
        ).to(device)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ModelLoadError(
            f"base {str(name_or_path)!r} cannot be loaded as a diffusers pipeline: "
            f"{_format_error(error)}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    return DiffusionBase(get_base_id(name_or_path), pipeline)


def get_base_id(name_or_path: str | Path) -> str:
    """Return the id of a base: the hub id itself, or the last two parts of a folder's path."""
    folder = Path(name_or_path)
    return "/".join(folder.resolve().parts[-2:]) if folder.exists() else str(name_or_path)


def make_unet_encoder(base: DiffusionBase, **options: Any) -> UNetFeatureEncoder:
    """Make an image encoder from the UNet of a base, under the empty prompt.

    Args:
        base: The base; its VAE and UNet are shared, not copied.
        options: Further arguments of ``UNetFeatureEncoder``.

    Returns:
        The encoder.
    """
    empty_prompt_embeds = base.encode_prompts([""])["encoder_hidden_states"]  # [1, tokens, width]
    return UNetFeatureEncoder(
        base.pipeline.vae, base.denoiser, base.noise_scheduler, empty_prompt_embeds, **options
    )


def _parse_dtype(name: torch.dtype | str) -> torch.dtype:
    """Parse the name of a floating point dtype, as configs write it."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidArgumentError(
            f"unknown dtype {name!r} for the base; known: float32, bfloat16, float16"
        )
    return dtype


def _format_error(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
