"""UNets with the blocks of Stable Diffusion 1, 2 and XL at 4 channels."""

from pathlib import Path
from typing import Any

from torch import nn

SMALL = {"sample_size": 8, "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4}
ARCHITECTURES = {
    "SD 1.x": "stable-diffusion-v1",
    "SD 2.x": "stable-diffusion-v2-768-v",
    "SDXL": "stable-diffusion-xl-v1-base",
}


def make_modules(family: str) -> dict[str, nn.Module]:
    """Make a UNet and its text encoders, by component."""
    from diffusers import UNet2DConditionModel

    if family == "SDXL":
        unet = UNet2DConditionModel(
            block_out_channels=(4, 4, 4),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 3),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=8,
            **SMALL,
        )
        encoders = ("text_encoder", "text_encoder_2")
    else:
        unet = UNet2DConditionModel(
            block_out_channels=(4, 4, 4, 4), use_linear_projection=family == "SD 2.x", **SMALL
        )
        encoders = ("text_encoder",)
    return {"unet": unet} | {name: make_text_encoder() for name in encoders}


def make_text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=9, bos_token_id=0, eos_token_id=1, max_position_embeddings=8, **sizes
        )
    )


def load_lora(family: str, path: Path) -> dict[str, nn.Module]:
    """Load a file in diffusers, as its pipelines do, into new modules."""
    from diffusers import loaders

    modules = make_modules(family)
    mixin: Any = (
        loaders.StableDiffusionXLLoraLoaderMixin
        if family == "SDXL"
        else loaders.StableDiffusionLoraLoaderMixin
    )
    state, alphas = mixin.lora_state_dict(path, unet_config=modules["unet"].config)
    mixin.load_lora_into_unet(state, alphas, modules["unet"])
    for name in modules.keys() - {"unet"}:
        mixin.load_lora_into_text_encoder(state, alphas, modules[name], prefix=name)
    return modules
