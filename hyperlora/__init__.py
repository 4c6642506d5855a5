"""A photo goes in, a LoRA comes out in one forward pass.

from hyperlora import ImageToLora
ImageToLora.from_pretrained("checkpoints/avatars/image-to-lora")(["me.png"]).save("me.safetensors")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperlora.adapters import injected, layout_of
    from hyperlora.client import AsyncClient, Client
    from hyperlora.errors import HyperloraError
    from hyperlora.formats import LoraHeader, load_lora, save_lora
    from hyperlora.lora import LoraLayout, LoraWeights
    from hyperlora.pipelines import ImageToLora, PairToLora, autolora, composed, load_base, refine, render

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

_ROOMS = {
    "AsyncClient": "client",
    "Client": "client",
    "HyperloraError": "errors",
    "ImageToLora": "pipelines",
    "LoraHeader": "formats",
    "LoraLayout": "lora",
    "LoraWeights": "lora",
    "PairToLora": "pipelines",
    "autolora": "pipelines",
    "composed": "pipelines",
    "injected": "adapters",
    "layout_of": "adapters",
    "load_base": "pipelines",
    "load_lora": "formats",
    "refine": "pipelines",
    "render": "pipelines",
    "save_lora": "formats",
}


def __getattr__(name: str) -> Any:
    """Import a room when one of its names is first used, so that `import hyperlora` costs nothing."""
    if name in _ROOMS:
        return getattr(import_module(f"hyperlora.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'hyperlora' has no attribute {name!r}")
