"""Tiny pipelines of the UNet families."""

from typing import Any

import torch

from tests.tiny_pipelines.base import PROMPTS, SIDE, TinyPipeline, make_image, make_vae
from tests.tiny_pipelines.text import WIDTH, make_clip_encoder, make_clip_tokenizer

SIZE = {"height": SIDE, "width": SIDE}


def _make_unet(in_channels: int = 4, **options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": in_channels,
        "sample_size": SIDE // 2,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH // 2,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**config | options)


def _make_xl_unet(in_channels: int = 4) -> Any:
    return _make_unet(
        in_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH // 2 + 6 * 8,
        transformer_layers_per_block=(1, 2),
    )


def _make_components(unet: Any) -> dict[str, Any]:
    from diffusers import DDIMScheduler

    tokenizer = make_clip_tokenizer()
    return {
        "vae": make_vae(),
        "unet": unet,
        "scheduler": DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        "tokenizer": tokenizer,
        "text_encoder": make_clip_encoder(tokenizer),
    }


def _make_xl_components(unet: Any) -> dict[str, Any]:
    components = _make_components(unet)
    tokenizer = make_clip_tokenizer()
    encoder = make_clip_encoder(tokenizer, seed=2, projection=True)
    return components | {"tokenizer_2": tokenizer, "text_encoder_2": encoder}


NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
NEGATIVE = {"negative_prompt": ["blurry"] * len(PROMPTS)}


def make_stable_diffusion() -> TinyPipeline:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(**_make_components(_make_unet()), **NO_CHECKER)
    return TinyPipeline(
        pipe, SIZE | {"guidance_scale": 1.0}, guidance=NEGATIVE | {"guidance_scale": 3.0}
    )


def make_stable_diffusion_xl() -> TinyPipeline:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(**_make_xl_components(_make_xl_unet()))
    return TinyPipeline(
        pipe, SIZE | {"guidance_scale": 1.0}, guidance=NEGATIVE | {"guidance_scale": 3.0}
    )


def make_instruct_pix2pix() -> TinyPipeline:
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipe = StableDiffusionInstructPix2PixPipeline(**_make_components(_make_unet(8)), **NO_CHECKER)
    images = make_image(count=len(PROMPTS))
    arguments = {"image": images, "guidance_scale": 1.0}
    scales = {"guidance_scale": 3.0, "image_guidance_scale": 1.5}
    return TinyPipeline(pipe, arguments, guidance=NEGATIVE | scales, images=images)


def make_instruct_pix2pix_xl() -> TinyPipeline:
    from diffusers import StableDiffusionXLInstructPix2PixPipeline

    pipe = StableDiffusionXLInstructPix2PixPipeline(**_make_xl_components(_make_xl_unet(8)))
    images = make_image(count=len(PROMPTS))
    arguments = SIZE | {"image": images, "guidance_scale": 1.0}
    scales = {"guidance_scale": 3.0, "image_guidance_scale": 1.5}
    return TinyPipeline(pipe, arguments, guidance=NEGATIVE | scales, images=images)
