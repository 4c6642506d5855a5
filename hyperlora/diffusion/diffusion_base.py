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

from hyperlora.encoders.unet_encoder import DenoiserEncoder
from hyperlora.errors import BadArtifact, BadRequest
from hyperlora.prompt_blending import shares

_ARCHITECTURES = {
    "StableDiffusionPipeline": "stable-diffusion-v1",
    "StableDiffusionInstructPix2PixPipeline": "stable-diffusion-v1",
    "StableDiffusionXLPipeline": "stable-diffusion-xl-v1-base",
    "StableDiffusion3Pipeline": "stable-diffusion-v3-medium",
    "FluxPipeline": "flux-1-dev",
}
Texts = dict[str, tuple[Tensor, Tensor | None]]
"""What prompts read as: text [tokens, width] and, for SDXL, pooled text [width]."""
KNOWN: Final = 1024
"""Texts to keep."""


@dataclass(frozen=True)
class Base:
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
    def noise_schedule(self) -> Any:
        """The training-time schedule of the pipeline's sampler: DDPM, or flow matching."""
        config = self.pipeline.scheduler.config
        kind = DDPMScheduler if "beta_schedule" in config else FlowMatchEulerDiscreteScheduler
        return kind.from_config(config)

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
    def encode_prompts(self, prompts: list[str], known: Texts | None = None) -> dict[str, Any]:
        """What the UNet is called with for these prompts (or ``hyperlora.prompt_blending`` of prompts):
        ``encoder_hidden_states`` [n, tokens, width] and, for SDXL, ``added_cond_kwargs`` (pooled text, and sizes of an
        uncropped picture). ``known``, empty at first, is filled with what plain prompts read as, for the next
        call: only while nothing changes the text encoders."""
        plain, rows = shares(prompts)
        if known is None and set(plain) == set(prompts):  # no blend: each by its own, as LoRAs of text encoders need
            text, pooled = self._encode(prompts)
        else:
            parts, pooled = self._encode(plain) if known is None else self._recall(plain, known)
            share = torch.tensor(rows, device=parts.device)
            with torch.autocast(parts.device.type, enabled=False):  # what tells colours apart is little
                text = torch.einsum("np,ptw->ntw", share, parts.float()).to(parts)
                pooled = None if pooled is None else (share @ pooled.float()).to(pooled)
        if pooled is None:
            return {"encoder_hidden_states": text}
        size = self.resolution
        ids = torch.tensor([[size, size, 0, 0, size, size]], device=text.device).repeat(len(prompts), 1)
        return {
            "encoder_hidden_states": text,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids.to(text)},
        }

    def _recall(self, plain: list[str], known: Texts) -> tuple[Tensor, Tensor | None]:
        """``_encode``, of what is not yet ``known``; of many sentences that is forgotten now and then."""
        if len(known) > KNOWN:
            known.clear()
        if new := [prompt for prompt in plain if prompt not in known]:
            text, pooled = self._encode(new)
            known.update({p: (text[i], None if pooled is None else pooled[i]) for i, p in enumerate(new)})
        texts = torch.stack([known[prompt][0] for prompt in plain])
        pools = [pool for prompt in plain if (pool := known[prompt][1]) is not None]
        return texts, torch.stack(pools) if pools else None

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """Text [n, tokens, width] and, for SDXL, pooled text [n, width]."""
        pipe = self.pipeline
        if not hasattr(pipe, "encode_prompt"):  # InstructPix2Pix
            return pipe._encode_prompt(prompts, pipe.device, 1, False), None
        if not hasattr(pipe, "text_encoder_2"):
            return pipe.encode_prompt(prompts, pipe.device, 1, False)[0], None
        text, _, pooled, _ = pipe.encode_prompt(prompts, device=pipe.device, do_classifier_free_guidance=False)
        return text, pooled


def load_base(name: str | Path, dtype: torch.dtype | str = torch.float32, device: str = "cpu", **options: Any) -> Base:
    """Load a pipeline folder or hub id, frozen, in evaluation mode; ``options`` go to ``from_pretrained``.

    Raises ``BadArtifact`` if the folder is no diffusers pipeline, ``BadRequest`` for a ``dtype`` torch does not know.
    """
    dtype = _dtype(dtype)
    folder = Path(name)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise BadArtifact(f"{folder} is no diffusers pipeline: model_index.json expected, none found; give --base")
    logging.disable_progress_bar()  # "Loading pipeline components" is no news to a user
    transformers_logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(name, dtype=dtype, **options).to(device)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise BadArtifact(f"base {str(name)!r} cannot be loaded as a diffusers pipeline: {_first(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    return Base(base_id(name), pipeline)


def base_id(name: str | Path) -> str:
    """The hub id itself, or the last two parts of a folder's path."""
    folder = Path(name)
    return "/".join(folder.resolve().parts[-2:]) if folder.exists() else str(name)


def _dtype(name: torch.dtype | str) -> torch.dtype:
    """``torch.bfloat16`` for "bfloat16", as configs write it."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise BadRequest(f"unknown dtype {name!r} for the base; known: float32, bfloat16, float16")
    return dtype


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def denoiser_encoder(base: Base, **options: Any) -> DenoiserEncoder:
    """The base's own UNet as the encoder of photos, under the empty prompt."""
    text = base.encode_prompts([""])["encoder_hidden_states"]
    return DenoiserEncoder(base.pipeline.vae, base.denoiser, base.noise_schedule, text, **options)
