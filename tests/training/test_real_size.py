"""The Stable Diffusion configurations at real size, the bases without weights (meta device)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn

from hyperlora.diffusion.target_modules import make_layout
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.model_card import ModelCard
from tests.training.config_rules import read_config

SD15 = {"sample_size": 64, "cross_attention_dim": 768}
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


def make_meta_unet(options: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel(**options)


def read_model_config(name: str) -> dict[str, Any]:
    return read_config(f"{name}/hypernetwork")["model"]["init_args"]


def make_config_layout(name: str, unet: nn.Module) -> LoraLayout:
    config = read_model_config(name)
    return make_layout({"unet": unet}, config["preset"], config["rank"], config["base"])


@pytest.mark.slow
def test_sd15_lora_loads_into_the_real_unet(tmp_path: Path) -> None:
    """ViT-B, the configured hypernetwork, SD 1.5's layout; diffusers loads the file completely."""
    config = read_model_config("sd15")
    unet = make_meta_unet(SD15).to_empty(device="cpu")  # never written to, so it takes no memory
    layout = make_config_layout("sd15", unet)
    assert (len(layout.targets), layout.numel) == (128, 797_184)
    torch.manual_seed(0)
    encoder = TimmEncoder(config["encoder"], config["encoder_options"]["image_size"])
    network = Hypernetwork(layout, encoder.width, **config["hypernetwork"])
    nn.init.normal_(network.code_proj, std=0.02)  # zero before training: ΔW = 0
    card = ModelCard.from_dict(config["card"])
    model = ImageToLora(encoder, network, card).eval().requires_grad_(False)
    weights = model.forward(torch.rand(1, 2, 3, 224, 224))[0]
    assert weights.compute_delta_norms().min() > 0
    path = save_lora(weights, tmp_path / "lora.safetensors")
    check_loaded_lora(StableDiffusionPipeline.lora_state_dict(path), unet, weights)


@pytest.mark.slow
def test_sdxl_lora_loads_into_the_real_unet(tmp_path: Path) -> None:
    unet = make_meta_unet(SDXL)
    layout = make_config_layout("sdxl", unet)
    assert (len(layout.targets), layout.numel) == (560, 5_806_080)
    with torch.device("meta"):
        Hypernetwork(layout, 768, **read_model_config("sdxl")["hypernetwork"])
    weights = LoraWeights.unflatten(layout, torch.randn(layout.numel))
    path = save_lora(weights, tmp_path / "lora.safetensors")
    check_loaded_lora(
        StableDiffusionXLPipeline.lora_state_dict(path, unet_config=unet.config), unet, weights
    )


def check_loaded_lora(loaded: Any, unet: nn.Module, weights: LoraWeights) -> None:
    """Each factor of the file is at its target, at strength 1, and there is no other."""
    state_dict, network_alphas = loaded[:2]
    unet.load_lora_adapter(
        state_dict, network_alphas=network_alphas, prefix="unet", low_cpu_mem_usage=True
    )
    factors = {name: p for name, p in unet.named_parameters() if ".lora_" in name}
    assert len(factors) == 2 * len(weights.layout.targets)
    for target, down, up in zip(weights.layout.targets, weights.down, weights.up, strict=True):
        assert unet.get_submodule(target.path).scaling == {"default_0": 1.0}
        for name, expected in ((f"{target.path}.lora_A", down), (f"{target.path}.lora_B", up)):
            factor = factors[f"{name}.default_0.weight"]
            assert factor.shape == expected.shape
            assert factor.is_meta or torch.equal(factor, expected)
