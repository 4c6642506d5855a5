"""Tiny pipelines of Stable Diffusion 3, FLUX.1, FLUX.1 Kontext and Z-Image."""

from typing import Any

import torch

from tests.tiny_pipelines.base import PROMPTS, SIDE, TinyPipeline, make_image, make_vae
from tests.tiny_pipelines.text import (
    WIDTH,
    make_clip_encoder,
    make_clip_tokenizer,
    make_qwen3_encoder,
    make_qwen_tokenizer,
    make_t5_encoder,
    make_t5_tokenizer,
)

SIZE = {"height": SIDE, "width": SIDE}
NEGATIVE = {"negative_prompt": ["blurry"] * len(PROMPTS)}


def _make_scheduler(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def make_stable_diffusion_3() -> TinyPipeline:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(2)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=SIDE,
    )
    clip, t5 = make_clip_tokenizer(), make_t5_tokenizer()
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=make_vae(scaling_factor=1.5305, shift_factor=0.0609),
        scheduler=_make_scheduler(shift=3.0),
        tokenizer=clip,
        tokenizer_2=clip,
        tokenizer_3=t5,
        text_encoder=make_clip_encoder(clip, 1, projection=True),
        text_encoder_2=make_clip_encoder(clip, 2, projection=True),
        text_encoder_3=make_t5_encoder(t5),
    )
    return TinyPipeline(
        pipe, SIZE | {"guidance_scale": 1.0}, guidance=NEGATIVE | {"guidance_scale": 3.0}
    )


def _make_flux_components(guidance_embeds: bool) -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(7)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH // 2,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )
    clip, t5 = make_clip_tokenizer(), make_t5_tokenizer()
    return {
        "transformer": transformer,
        "vae": make_vae(scaling_factor=0.3611, shift_factor=0.1159),
        "scheduler": _make_scheduler(use_dynamic_shifting=True),
        "tokenizer": clip,
        "tokenizer_2": t5,
        "text_encoder": make_clip_encoder(clip),
        "text_encoder_2": make_t5_encoder(t5),
    }


def _unpack_flux(pipe: Any) -> Any:
    return lambda tokens: pipe._unpack_latents(tokens, SIDE, SIDE, pipe.vae_scale_factor)


def make_flux(guidance_embeds: bool = True) -> TinyPipeline:
    from diffusers import FluxPipeline

    pipe = FluxPipeline(**_make_flux_components(guidance_embeds))
    arguments = SIZE | {"guidance_scale": 3.5}
    return TinyPipeline(pipe, arguments, _unpack_flux(pipe))


def make_flux_schnell() -> TinyPipeline:
    return make_flux(guidance_embeds=False)


def make_flux_kontext() -> TinyPipeline:
    from diffusers import FluxKontextPipeline

    pipe = FluxKontextPipeline(**_make_flux_components(True))
    images = make_image(count=len(PROMPTS))
    arguments = SIZE | {
        "image": images,
        "guidance_scale": 3.5,
        "max_area": SIDE**2,
        "_auto_resize": False,
    }
    return TinyPipeline(pipe, arguments, _unpack_flux(pipe), images=images)


def make_z_image() -> TinyPipeline:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(8)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    tokenizer = make_qwen_tokenizer()
    pipe = ZImagePipeline(
        transformer=transformer,
        vae=make_vae(scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=_make_scheduler(shift=3.0),
        tokenizer=tokenizer,
        text_encoder=make_qwen3_encoder(tokenizer),
    )
    arguments = SIZE | {"guidance_scale": 0.0}
    return TinyPipeline(pipe, arguments, guidance=NEGATIVE | {"guidance_scale": 3.0})
