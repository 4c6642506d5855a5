"""Tiny released networks on disk, in the layouts of the real ones."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hyperlora.models.i2l import I2lConfig

SIGLIP_CONFIG = SiglipVisionConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=32,
    patch_size=16,
)
DINOV3_CONFIG = DINOv3ViTConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=32,
    num_register_tokens=4,
    use_gated_mlp=True,
    hidden_act="silu",
    key_bias=False,
)
CLIP_CONFIG = CLIPVisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    projection_dim=10,
)
EMBEDDING_DIM = SIGLIP_CONFIG.hidden_size + DINOV3_CONFIG.hidden_size


def make_photo(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def make_encoder(encoder_class: Any, config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = encoder_class(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def make_siglip() -> Any:
    return make_encoder(SiglipVisionModel, SIGLIP_CONFIG)


def make_dinov3() -> Any:
    return make_encoder(DINOv3ViTModel, DINOV3_CONFIG)


def make_clip() -> Any:
    return make_encoder(CLIPVisionModelWithProjection, CLIP_CONFIG)


def save_encoders(folder: Path) -> None:
    """Write both encoders of i2L where ``General-Image-Encoders`` has them."""
    for name, model in (("SigLIP2-G384", make_siglip()), ("DINOv3-7B", make_dinov3())):
        (folder / name).mkdir(parents=True)
        tensors = {key.removeprefix("model."): tensor for key, tensor in model.state_dict().items()}
        save_file(tensors, folder / name / "model.safetensors")


def save_clip(folder: Path) -> None:
    """Write CLIP with a text half that nobody needs."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {**make_clip().state_dict(), "text_projection.weight": torch.zeros(3, 3)}
    save_file(tensors, folder / "model.safetensors")


def save_i2l(config: I2lConfig, path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            name: (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16()
            for name, shape in config.tensor_shapes.items()
        },
        path,
    )


def save_lorweb(linears: dict[str, tuple[int, int]], path: Path) -> None:
    """Write a basis of 3 LoRAs of rank 2 for layers by path, with in and out features."""
    generator = torch.Generator().manual_seed(2)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer, (in_features, out_features) in linears.items():
        for tail, shape in (
            ("lora_A", (3, in_features, 2)),
            ("lora_B", (3, 2, out_features)),
            ("lora_keys", (3, 6)),
            ("lora_to_q.weight", (6, 3 * CLIP_CONFIG.projection_dim)),
        ):
            tensor = torch.randn(shape, generator=generator) * 0.5
            tensors[f"transformer.{layer}.{tail}"] = tensor
    save_file(tensors, path)
