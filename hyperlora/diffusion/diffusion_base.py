"""Base models: any Stable Diffusion 1.x or XL (or DiT) pipeline of diffusers, from a folder or the hub."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from hyperlora.encoders.unet_encoder import UNetFeatureEncoder
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.prompt_blending import compute_blend_matrix

_ARCHITECTURES = {
    "StableDiffusionPipeline": "stable-diffusion-v1",
    "StableDiffusionInstructPix2PixPipeline": "stable-diffusion-v1",
    "StableDiffusionXLPipeline": "stable-diffusion-xl-v1-base",
    "StableDiffusion3Pipeline": "stable-diffusion-v3-medium",
    "FluxPipeline": "flux-1-dev",
}
PromptCache = dict[str, tuple[Tensor, Tensor | None]]
"""What prompts read as: text [tokens, width] and, for SDXL, pooled text [width]."""
CACHE_SIZE: Final = 1024
"""Texts to keep."""


@dataclass(frozen=True)
class DiffusionBase:
    """A frozen pipeline and its id: the hub id, or the last two parts of a folder's path."""

    id: str
    pipeline: Any

    @property
    def architecture(self) -> str:
        """The modelspec name of the model family."""
        return _ARCHITECTURES.get(type(self.pipeline).__name__, type(self.pipeline).__name__)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Components that can take a LoRA: ``unet`` or ``transformer``, and the text encoders."""
        names = ("unet", "transformer", "text_encoder", "text_encoder_2")
        return {n: m for n in names if isinstance(m := getattr(self.pipeline, n, None), nn.Module)}

    @property
    def denoiser(self) -> nn.Module:
        return next(iter(self.modules.values()))

    @property
    def resolution(self) -> int:
        """Pixels of a side that the denoiser was trained at."""
        config: Any = self.denoiser.config
        return int(config.sample_size * self.pipeline.vae_scale_factor)

    @cached_property
    def noise_scheduler(self) -> Any:
        """The training-time schedule of the pipeline's sampler: DDPM, or flow matching."""
        config = self.pipeline.scheduler.config
        scheduler_class = (
            DDPMScheduler if "beta_schedule" in config else FlowMatchEulerDiscreteScheduler
        )
        return scheduler_class.from_config(config)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """[n, 3, h, w] in [0, 1] to scaled latents [n, c, h/f, w/f] (posterior means)."""
        vae = self.pipeline.vae
        mean = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mean
        return (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [n, c, h/f, w/f] to pictures [n, 3, h, w] in [0, 1]; gradients flow."""
        vae = self.pipeline.vae
        raw = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        return (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_prompts(
        self, prompts: list[str], cache: PromptCache | None = None
    ) -> dict[str, Any]:
        """What the UNet is called with for these prompts (or ``main_callback.prompt_blending`` of prompts):
        ``encoder_hidden_states`` [n, tokens, width] and, for SDXL, ``added_cond_kwargs`` (pooled text, and sizes of an
        uncropped picture). ``cache``, empty at first, is filled with what plain prompts read as, for the next
        call: only while nothing changes the text encoders."""
        unique_prompts, blend_weights = compute_blend_matrix(prompts)
        if cache is None and set(unique_prompts) == set(
            prompts
        ):  # no blend: each by its own, as LoRAs of text encoders need
            prompt_embeds, pooled_prompt_embeds = self._encode_text(prompts)
        else:
            unique_embeds, pooled_prompt_embeds = (
                self._encode_text(unique_prompts)
                if cache is None
                else self._encode_with_cache(unique_prompts, cache)
            )
            weight_matrix = torch.tensor(blend_weights, device=unique_embeds.device)
            with torch.autocast(
                unique_embeds.device.type, enabled=False
            ):  # what tells colours apart is little
                prompt_embeds = torch.einsum(
                    "np,ptw->ntw", weight_matrix, unique_embeds.float()
                ).to(unique_embeds)
                pooled_prompt_embeds = (
                    None
                    if pooled_prompt_embeds is None
                    else (weight_matrix @ pooled_prompt_embeds.float()).to(pooled_prompt_embeds)
                )
        if pooled_prompt_embeds is None:
            return {"encoder_hidden_states": prompt_embeds}
        size = self.resolution
        add_time_ids = torch.tensor(
            [[size, size, 0, 0, size, size]], device=prompt_embeds.device
        ).repeat(len(prompts), 1)
        return {
            "encoder_hidden_states": prompt_embeds,
            "added_cond_kwargs": {
                "text_embeds": pooled_prompt_embeds,
                "time_ids": add_time_ids.to(prompt_embeds),
            },
        }

    def _encode_with_cache(
        self, prompts: list[str], cache: PromptCache
    ) -> tuple[Tensor, Tensor | None]:
        """``_encode_text``, of what is not yet ``cache``; of many sentences that is forgotten now and then."""
        if len(cache) > CACHE_SIZE:
            cache.clear()
        if new_prompts := [prompt for prompt in prompts if prompt not in cache]:
            prompt_embeds, pooled_prompt_embeds = self._encode_text(new_prompts)
            cache.update(
                {
                    p: (
                        prompt_embeds[i],
                        None if pooled_prompt_embeds is None else pooled_prompt_embeds[i],
                    )
                    for i, p in enumerate(new_prompts)
                }
            )
        stacked_embeds = torch.stack([cache[prompt][0] for prompt in prompts])
        pooled_embeds = [pool for prompt in prompts if (pool := cache[prompt][1]) is not None]
        return stacked_embeds, torch.stack(pooled_embeds) if pooled_embeds else None

    def _encode_text(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """Text [n, tokens, width] and, for SDXL, pooled text [n, width]."""
        pipe = self.pipeline
        if not hasattr(pipe, "encode_prompt"):  # InstructPix2Pix
            return pipe._encode_prompt(prompts, pipe.device, 1, False), None
        if not hasattr(pipe, "text_encoder_2"):
            return pipe.encode_prompt(prompts, pipe.device, 1, False)[0], None
        prompt_embeds, _, pooled_prompt_embeds, _ = pipe.encode_prompt(
            prompts, device=pipe.device, do_classifier_free_guidance=False
        )
        return prompt_embeds, pooled_prompt_embeds


def load_diffusion_base(
    name_or_path: str | Path,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    **pretrained_kwargs: Any,
) -> DiffusionBase:
    """Load a pipeline folder or hub id, frozen, in evaluation mode; ``pretrained_kwargs`` go to ``from_pretrained``.

    Raises ``ModelLoadError`` if the folder is no diffusers pipeline, ``InvalidArgumentError`` for a ``dtype`` torch does not know.
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
            f"base {str(name_or_path)!r} cannot be loaded as a diffusers pipeline: {_format_error(error)}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    return DiffusionBase(get_base_id(name_or_path), pipeline)


def get_base_id(name_or_path: str | Path) -> str:
    """The hub id itself, or the last two parts of a folder's path."""
    folder = Path(name_or_path)
    return "/".join(folder.resolve().parts[-2:]) if folder.exists() else str(name_or_path)


def _parse_dtype(name: torch.dtype | str) -> torch.dtype:
    """``torch.bfloat16`` for "bfloat16", as configs write it."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidArgumentError(
            f"unknown dtype {name!r} for the base; known: float32, bfloat16, float16"
        )
    return dtype


def _format_error(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def make_unet_encoder(base: DiffusionBase, **options: Any) -> UNetFeatureEncoder:
    """The base's own UNet as the encoder of photos, under the empty prompt."""
    empty_prompt_embeds = base.encode_prompts([""])["encoder_hidden_states"]
    return UNetFeatureEncoder(
        base.pipeline.vae, base.denoiser, base.noise_scheduler, empty_prompt_embeds, **options
    )
