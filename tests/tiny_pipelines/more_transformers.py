"""Tiny pipelines of Chroma, Lumina 2, HiDream, Krea 2 and Qwen-Image 2.1."""

from typing import Any

import torch

from tests.tiny_pipelines.base import PROMPTS, SIDE, TinyPipeline, make_vae
from tests.tiny_pipelines.more_text import (
    make_gemma2_encoder,
    make_gemma_tokenizer,
    make_llama_encoder,
    make_llama_tokenizer,
    make_qwen3_vl_encoder,
    make_qwen3_vl_processor,
)
from tests.tiny_pipelines.text import (
    WIDTH,
    make_clip_encoder,
    make_clip_tokenizer,
    make_qwen_tokenizer,
    make_t5_encoder,
    make_t5_tokenizer,
)

HEIGHT, WIDTH_IN_PIXELS = SIDE, 2 * SIDE
"""Not square: swapped axes would show."""
SIZE = {"height": HEIGHT, "width": WIDTH_IN_PIXELS}
NEGATIVE = {"negative_prompt": ["blurry"] * len(PROMPTS)}
FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def _make_scheduler(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def make_chroma() -> TinyPipeline:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    torch.manual_seed(9)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    tokenizer = make_t5_tokenizer()
    pipe = ChromaPipeline(
        transformer=transformer,
        vae=make_vae(**FLUX_VAE),
        scheduler=_make_scheduler(use_dynamic_shifting=True),
        tokenizer=tokenizer,
        text_encoder=make_t5_encoder(tokenizer),
    )
    return TinyPipeline(
        pipe,
        SIZE | {"guidance_scale": 1.0},
        lambda tokens: pipe._unpack_latents(tokens, HEIGHT, WIDTH_IN_PIXELS, pipe.vae_scale_factor),
        guidance=NEGATIVE | {"guidance_scale": 3.0},
    )


def make_lumina_2() -> TinyPipeline:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(10)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 16, 16),
        cap_feat_dim=WIDTH,
    )
    tokenizer = make_gemma_tokenizer()
    pipe = Lumina2Pipeline(
        transformer=transformer,
        vae=make_vae(**FLUX_VAE),
        scheduler=_make_scheduler(shift=6.0),
        tokenizer=tokenizer,
        text_encoder=make_gemma2_encoder(tokenizer),
    )
    # this pipeline takes VAEs to divide sides by 8
    arguments = {"height": 8 * 8, "width": 8 * 16, "guidance_scale": 1.0}
    return TinyPipeline(pipe, arguments, guidance=NEGATIVE | {"guidance_scale": 3.0})


def make_hidream() -> TinyPipeline:
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel

    torch.manual_seed(11)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=WIDTH,
        num_routed_experts=3,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(SIDE // 2, SIDE // 2),
        llama_layers=[0, 2, 2],
    )
    clip, t5, llama = make_clip_tokenizer(128), make_t5_tokenizer(), make_llama_tokenizer()
    pipe = HiDreamImagePipeline(
        transformer=transformer,
        vae=make_vae(**FLUX_VAE),
        scheduler=_make_scheduler(shift=3.0),
        tokenizer=clip,
        tokenizer_2=clip,
        tokenizer_3=t5,
        tokenizer_4=llama,
        text_encoder=make_clip_encoder(clip, 1, projection=True),
        text_encoder_2=make_clip_encoder(clip, 2, projection=True),
        text_encoder_3=make_t5_encoder(t5),
        text_encoder_4=make_llama_encoder(llama),
    )
    pipe.default_sample_size = SIDE // 2  # sizes are scaled to this area
    arguments = {"height": SIDE // 2, "width": 2 * SIDE, "guidance_scale": 1.0}
    return TinyPipeline(pipe, arguments, guidance=NEGATIVE | {"guidance_scale": 3.0})


def make_krea_2(is_distilled: bool = False) -> TinyPipeline:
    from diffusers import AutoencoderKLQwenImage, Krea2Pipeline, Krea2Transformer2DModel

    torch.manual_seed(12)
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[2.0, 0.5, 1.5, 3.0],
    )
    tokenizer = make_qwen_tokenizer()
    pipe = Krea2Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=_make_scheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        tokenizer=tokenizer,
        text_encoder=make_qwen3_vl_encoder(tokenizer),
        text_encoder_select_layers=(1, 3),
        is_distilled=is_distilled,
    )
    return TinyPipeline(
        pipe,
        SIZE | {"guidance_scale": 0.0},
        lambda tokens: pipe._unpack_latents(tokens, HEIGHT, WIDTH_IN_PIXELS).squeeze(2),
        guidance=NEGATIVE | {"guidance_scale": 3.0},
    )


def make_krea_2_turbo() -> TinyPipeline:
    return make_krea_2(is_distilled=True)


def make_qwen_image_21() -> TinyPipeline:
    from diffusers import (
        AutoencoderKLQwenImage21,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )

    torch.manual_seed(13)
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
    )
    vae = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[2.0, 0.5, 1.5, 3.0],
    )
    tokenizer = make_qwen_tokenizer()
    pipe = QwenImage21Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=_make_scheduler(use_dynamic_shifting=True),
        processor=make_qwen3_vl_processor(tokenizer),
        text_encoder=make_qwen3_vl_encoder(tokenizer, causal_lm=True),
    )
    # one slot of the prompt's sequence holds 2 x 2 latents of 16 x 16 pixels
    height, width = 2 * SIDE, 4 * SIDE
    return TinyPipeline(
        pipe,
        {"height": height, "width": width, "use_kv_cache": False},
        lambda tokens: pipe._unpack_latents(tokens, height, width, pipe.vae_scale_factor).squeeze(
            2
        ),
        guidance=NEGATIVE | {"true_cfg_scale": 3.0},
    )
