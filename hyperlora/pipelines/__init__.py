"""The product's verbs: photos to LoRAs, refining, fitting, rendering. No Lightning here."""

from hyperlora.pipelines.bases import Base, load_base
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.refining import refine
from hyperlora.pipelines.rendering import render

__all__ = ["Base", "ImageToLora", "load_base", "refine", "render"]
