"""A photo goes in, a LoRA comes out in one forward pass.

from hyperlora import ImageToLora
ImageToLora.from_pretrained("checkpoints/avatars/image-to-lora")(["me.png"]).save("me.safetensors")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperlora.client import AsyncClient, Client
    from hyperlora.diffusion.autolora_guidance import autolora
    from hyperlora.diffusion.diffusion_base import load_base
    from hyperlora.diffusion.lora_injection import injected
    from hyperlora.diffusion.multi_lora import composed
    from hyperlora.diffusion.target_modules import layout_of
    from hyperlora.diffusion.text_to_image import render
    from hyperlora.errors import HyperloraError
    from hyperlora.finetuning.refine import refine
    from hyperlora.lora.io.load import load_lora
    from hyperlora.lora.io.metadata import LoraHeader
    from hyperlora.lora.io.save import save_lora
    from hyperlora.lora.layout import LoraLayout
    from hyperlora.lora.weights import LoraWeights
    from hyperlora.pipelines.image_to_lora import ImageToLora
    from hyperlora.pipelines.pair_to_lora import PairToLora

_MODULES = {
    "AsyncClient": "client",
    "Client": "client",
    "HyperloraError": "errors",
    "ImageToLora": "pipelines.image_to_lora",
    "LoraHeader": "lora.io.metadata",
    "LoraLayout": "lora.layout",
    "LoraWeights": "lora.weights",
    "PairToLora": "pipelines.pair_to_lora",
    "autolora": "diffusion.autolora_guidance",
    "composed": "diffusion.multi_lora",
    "injected": "diffusion.lora_injection",
    "layout_of": "diffusion.target_modules",
    "load_base": "diffusion.diffusion_base",
    "load_lora": "lora.io.load",
    "refine": "finetuning.refine",
    "render": "diffusion.text_to_image",
    "save_lora": "lora.io.save",
}

__all__ = [
    "AsyncClient",
    "Client",
    "HyperloraError",
    "ImageToLora",
    "LoraHeader",
    "LoraLayout",
    "LoraWeights",
    "PairToLora",
    "autolora",
    "composed",
    "injected",
    "layout_of",
    "load_base",
    "load_lora",
    "refine",
    "render",
    "save_lora",
]


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first used, so that ``import hyperlora`` costs nothing."""
    if name in _MODULES:
        return getattr(import_module(f"hyperlora.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'hyperlora' has no attribute {name!r}")
