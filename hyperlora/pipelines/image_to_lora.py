"""``ImageToLora``: photos of a subject in, LoRA weights out, in one forward pass."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import Base, denoiser_encoder, load_base
from hyperlora.encoders.timm_encoder import VisionEncoder
from hyperlora.encoders.unet_encoder import DenoiserEncoder
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.pipelines.image_to_lora_base import PhotoModel, Sampling

Encoder = VisionEncoder | DenoiserEncoder


class ImageToLora(PhotoModel):
    """A photo encoder and the hypernetwork it conditions: one released artifact.

    ``ImageToLora.from_pretrained(folder_or_hub_id)(["me.jpg"])`` is a LoRA for ``layout.base``. ``card["base"]`` is
    where a model that looks through its base finds it: a hub id, or a path relative to the model's folder;
    ``card["strength"]`` was chosen on validation people (``benchmarks/choose_strength.py``). ``domain`` tells photos
    like those it was trained on from others, where its folder holds one.
    """

    def __init__(self, encoder: Encoder, hypernetwork: Hypernetwork, card: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.encoder, self.hypernetwork = encoder, hypernetwork
        self.card = card or {}

    @property
    def layout(self) -> LoraLayout:
        return self.hypernetwork.layout

    def parts(self) -> dict[str, Any]:
        return {"encoder": self.encoder.config, "hypernetwork": self.hypernetwork.config}

    @classmethod
    def built(cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: Base | None) -> Self:
        return cls(_encoder(config, folder, base), Hypernetwork(layout, **config["hypernetwork"]))

    def made(self, features: ImageFeatures, sampling: Sampling | None = None) -> LoraWeights:
        """One LoRA per subject (batch axis) from what the encoder says; nothing is left to chance."""
        return self.strong(self.hypernetwork(features))

    @torch.no_grad()
    def features(self, photos: Tensor) -> ImageFeatures:
        """The encoder is frozen everywhere: its features never carry gradients."""
        return self.encoder(photos)


def _encoder(config: dict[str, Any], folder: Path, base: Base | None) -> Encoder:
    options = dict(config["encoder"])
    if options["name"] != "denoiser":
        return VisionEncoder(**options)
    if base is None:
        home = config["card"]["base"]
        base = load_base(folder / home if (folder / home).is_dir() else home)
    del options["name"]
    return denoiser_encoder(base, **options)
