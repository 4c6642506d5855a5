"""Which weights of a base model a LoRA may change (``sites``), and making it act on a live model (``injected``)."""

from hyperlora.adapters.injection import injected
from hyperlora.adapters.sites import PRESETS, layout_of

__all__ = ["PRESETS", "injected", "layout_of"]
