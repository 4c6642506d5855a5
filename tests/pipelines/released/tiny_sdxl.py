"""A tiny SDXL on disk, with the 22 attentions of the tiny HyperLoRA."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.tiny_pipelines.base import make_vae
from tests.tiny_pipelines.text import make_clip_tokenizer

RESOLUTION = 32
TEXT_WIDTH = 24


def save_sdxl(folder: Path) -> Path:
    """Write a pipeline whose UNet has blocks like SDXL's, of 32, 64 and 128 channels."""
    torch.manual_seed(0)
    tokenizer = make_clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 2,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=1,
        cross_attention_dim=2 * TEXT_WIDTH,
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
        norm_num_groups=8,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=make_vae(),
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder=_make_text_encoder(CLIPTextModel, tokenizer),
        text_encoder_2=_make_text_encoder(CLIPTextModelWithProjection, tokenizer),
    )
    pipeline.save_pretrained(folder)
    return folder


def _make_text_encoder(encoder_class: Any, tokenizer: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return encoder_class(config)
