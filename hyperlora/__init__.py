"""A photo goes in, a LoRA comes out in one forward pass.

from hyperlora import ImageToLora

model = ImageToLora.from_pretrained("checkpoints/avatars/image-to-lora")
model(["me.png"]).save("me.safetensors")
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperlora.client import AsyncClient, Client
    from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.diffusion.lora_injection import inject_lora
    from hyperlora.diffusion.multi_lora import compose_loras
    from hyperlora.diffusion.target_modules import make_layout
    from hyperlora.diffusion.text_to_image import generate_images
    from hyperlora.errors import HyperloraError
    from hyperlora.finetuning.refine import refine_lora
    from hyperlora.lora.io.load import load_lora
    from hyperlora.lora.io.lora import Lora
    from hyperlora.lora.io.metadata import LoraMetadata
    from hyperlora.lora.io.save import save_lora
    from hyperlora.lora.layout import LoraLayout
    from hyperlora.lora.weights import LoraWeights
    from hyperlora.pipelines.auto import load_photo_model
    from hyperlora.pipelines.image_to_lora import ImageToLora
    from hyperlora.pipelines.pair_to_lora import PairToLora

_MODULES = {
    "AsyncClient": "client",
    "Client": "client",
    "HyperloraError": "errors",
    "ImageToLora": "pipelines.image_to_lora",
    "Lora": "lora.io.lora",
    "LoraLayout": "lora.layout",
    "LoraMetadata": "lora.io.metadata",
    "LoraWeights": "lora.weights",
    "PairToLora": "pipelines.pair_to_lora",
    "apply_autolora_guidance": "diffusion.autolora_guidance",
    "compose_loras": "diffusion.multi_lora",
    "generate_images": "diffusion.text_to_image",
    "inject_lora": "diffusion.lora_injection",
    "load_diffusion_base": "diffusion.diffusion_base",
    "load_lora": "lora.io.load",
    "load_photo_model": "pipelines.auto",
    "make_layout": "diffusion.target_modules",
    "refine_lora": "finetuning.refine",
    "save_lora": "lora.io.save",
}

__all__ = [
    "AsyncClient",
    "Client",
    "HyperloraError",
    "ImageToLora",
    "Lora",
    "LoraLayout",
    "LoraMetadata",
    "LoraWeights",
    "PairToLora",
    "apply_autolora_guidance",
    "compose_loras",
    "generate_images",
    "inject_lora",
    "load_diffusion_base",
    "load_lora",
    "load_photo_model",
    "make_layout",
    "refine_lora",
    "save_lora",
]


def __getattr__(name: str) -> object:
    """Import the module of a public name at its first use, so that ``import hyperlora`` is fast."""
    if name in _MODULES:
        return getattr(import_module(f"hyperlora.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'hyperlora' has no attribute {name!r}")
