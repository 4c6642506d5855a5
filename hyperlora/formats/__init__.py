"""LoRA files: written so that every tool takes them, read as if nobody could be trusted.

LoraWeights ── save_lora ──▶ .safetensors (diffusers or kohya keys, header) ── load_lora ──▶ LoraFile
"""

from hyperlora.formats.description import LoraDescription, describe
from hyperlora.formats.header import LoraHeader
from hyperlora.formats.reading import LoraFile, load_lora
from hyperlora.formats.writing import lora_bytes, save_lora

__all__ = ["LoraDescription", "LoraFile", "LoraHeader", "describe", "load_lora", "lora_bytes", "save_lora"]
