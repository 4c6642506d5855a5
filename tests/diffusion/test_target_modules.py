"""Presets on the real architectures (meta device), counted against PEFT."""

import pytest
import torch
from torch import nn

from hyperlora.diffusion.target_modules import TARGET_PRESETS, make_layout
from hyperlora.errors import InvalidArgumentError
from tests.tiny_pipelines import get_tiny_pipeline

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def make_meta_unet(config: dict[str, object]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize(
    ("config", "num_targets", "num_parameters"), [(SD15, 128, 797_184), (SDXL, 560, 5_806_080)]
)
def test_attention_preset_equals_peft(
    config: dict[str, object], num_targets: int, num_parameters: int
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    unet = make_meta_unet(config)
    layout = make_layout({"unet": unet}, "attention", 4, "base")
    assert (len(layout.targets), layout.numel) == (num_targets, num_parameters)
    with torch.device("meta"):
        inject_adapter_in_model(
            LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
            unet,
            low_cpu_mem_usage=True,
        )
    peft_paths = {
        name.removesuffix(".lora_A") for name, _ in unet.named_modules() if name.endswith(".lora_A")
    }
    assert peft_paths == {target.path for target in layout.targets}
    assert (
        sum(p.numel() for name, p in unet.named_parameters() if "lora_" in name) == num_parameters
    )


def test_wider_presets_contain_the_attention_preset(unet: nn.Module) -> None:
    paths = {
        preset: {target.path for target in make_layout({"unet": unet}, preset, 2, "b").targets}
        for preset in TARGET_PRESETS
    }
    assert paths["attention"] < paths["attention+mlp"]
    assert paths["attention"] < paths["attention+conv"]
    conv_paths = paths["attention+conv"]
    assert {"down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv"} <= conv_paths
    assert "down_blocks.0.resnets.0.time_emb_proj" in paths["attention+mlp"] - conv_paths


def test_attention_preset_covers_text_encoder_projections(text_encoder: nn.Module) -> None:
    layout = make_layout({"text_encoder": text_encoder}, "attention", 2, "b")
    assert len(layout.targets) == 2 * 4
    assert {target.path.rsplit(".", 1)[1] for target in layout.targets} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
    }


def test_attention_preset_covers_both_streams_of_a_transformer(transformer: nn.Module) -> None:
    leaves = {
        target.path.split("attn.")[-1]
        for target in make_layout({"transformer": transformer}, "attention", 2, "b").targets
    }
    assert leaves == {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    }


def test_make_layout_rejects_unknown_presets_and_ranks(unet: nn.Module) -> None:
    with pytest.raises(InvalidArgumentError, match="unknown preset 'all'; known: attention"):
        make_layout({"unet": unet}, "all", 4, "b")
    with pytest.raises(InvalidArgumentError, match="at least 1, got 0"):
        make_layout({"unet": unet}, "attention", 0, "b")
    with pytest.raises(InvalidArgumentError, match="Linear is no denoiser that is supported"):
        make_layout({"unet": nn.Linear(2, 2)}, "attention", 4, "b")


@pytest.mark.parametrize("name", ["flux", "chroma", "flux2", "lumina_2", "qwen_image", "z_image"])
def test_presets_of_a_transformer_add_what_they_name(name: str) -> None:
    transformer = get_tiny_pipeline(name).pipe.transformer
    attention, feed_forward = (
        {
            target.path
            for target in make_layout({"transformer": transformer}, preset, 2, "b").targets
        }
        for preset in ("attention", "attention+mlp")
    )
    assert attention < feed_forward
    if hasattr(transformer, "single_transformer_blocks"):
        single_paths = {path for path in attention if path.startswith("single_transformer_blocks.")}
        assert len(single_paths) >= 2 * len(transformer.single_transformer_blocks)
    with pytest.raises(InvalidArgumentError, match="has no convolutions that take a LoRA"):
        make_layout({"transformer": transformer}, "attention+conv", 2, "b")


@pytest.mark.parametrize("preset", TARGET_PRESETS)
def test_make_layout_refuses_presets_that_match_nothing_they_name(preset: str) -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 4, "up_block_types": ("UpBlock2D",) * 4}
    unet = make_meta_unet(SD15 | blocks | {"mid_block_type": None})
    with pytest.raises(InvalidArgumentError, match="names attention, and the unet of this"):
        make_layout({"unet": unet}, preset, 2, "b")
