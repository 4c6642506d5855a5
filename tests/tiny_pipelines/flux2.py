"""Tiny pipelines of FLUX.2 dev and klein, with and without an input image."""

from typing import Any

import torch
from torch import Tensor

from tests.tiny_pipelines.base import PROMPTS, SIDE, TinyPipeline, make_pil_image, to_tensor
from tests.tiny_pipelines.text import (
    WIDTH,
    make_mistral3_encoder,
    make_pixtral_processor,
    make_qwen3_encoder,
    make_qwen_tokenizer,
)

HEIGHT, WIDTH_IN_PIXELS = SIDE, 2 * SIDE
"""Not square: swapped axes would show."""


def _make_components(text_width: int, guidance_embeds: bool) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    torch.manual_seed(14)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * text_width,  # three layers of the text encoder
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return {
        "transformer": transformer,
        "vae": _make_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def _make_vae() -> Any:
    """A VAE that halves the sides, with the statistics of some latents."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(3)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def _make_tiny_pipeline(pipe: Any, has_image: bool, **arguments: Any) -> TinyPipeline:
    arguments |= {"height": HEIGHT, "width": WIDTH_IN_PIXELS}
    images = None
    if has_image:  # at least 64 pixels wide and high; all prompts get the same one
        image = make_pil_image(64, 80)
        arguments["image"] = image
        images = to_tensor(image).expand(len(PROMPTS), -1, -1, -1)

    def unpack(tokens: Tensor) -> Tensor:
        latent_ids = pipe._prepare_latent_ids(torch.empty(len(tokens), 1, HEIGHT // 4, SIDE // 2))
        return pipe._unpack_latents_with_ids(tokens, latent_ids)

    return TinyPipeline(pipe, arguments, unpack, images=images)


def make_flux2(has_image: bool = False) -> TinyPipeline:
    from diffusers import Flux2Pipeline

    processor = make_pixtral_processor()
    pipe = Flux2Pipeline(
        tokenizer=processor,
        text_encoder=make_mistral3_encoder(processor, num_layers=30),
        **_make_components(text_width=8, guidance_embeds=True),
    )
    return _make_tiny_pipeline(pipe, has_image)


def make_flux2_klein(has_image: bool = False, is_distilled: bool = False) -> TinyPipeline:
    from dataclasses import replace

    from diffusers import Flux2KleinPipeline

    tokenizer = make_qwen_tokenizer()
    pipe = Flux2KleinPipeline(
        tokenizer=tokenizer,
        text_encoder=make_qwen3_encoder(tokenizer, num_layers=27, causal_lm=True),
        is_distilled=is_distilled,
        **_make_components(text_width=WIDTH, guidance_embeds=False),
    )
    tiny = _make_tiny_pipeline(pipe, has_image, guidance_scale=1.0)
    return tiny if is_distilled else replace(tiny, guidance={"guidance_scale": 3.0})


def make_flux2_edit() -> TinyPipeline:
    return make_flux2(has_image=True)


def make_flux2_klein_edit() -> TinyPipeline:
    return make_flux2_klein(has_image=True)


def make_flux2_klein_distilled() -> TinyPipeline:
    return make_flux2_klein(is_distilled=True)
