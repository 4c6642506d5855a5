"""The product's verbs: photos to LoRAs, refining, fitting, rendering, composition, guidance. No Lightning here."""

from hyperlora.pipelines.bases import Base, load_base
from hyperlora.pipelines.composition import composed
from hyperlora.pipelines.guidance import autolora
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.refining import refine
from hyperlora.pipelines.rendering import render

__all__ = ["Base", "ImageToLora", "PairToLora", "autolora", "composed", "load_base", "refine", "render"]
