"""``ImageToLora``: photos of a subject in, LoRA weights out, in one forward pass."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base, make_unet_encoder
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.encoders.unet_encoder import UNetFeatureEncoder
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase, SamplingConfig

Encoder = TimmEncoder | UNetFeatureEncoder


class ImageToLora(ImageToLoraBase):
    """A photo encoder and the hypernetwork it conditions: one released artifact.

    ``ImageToLora.from_pretrained(folder_or_hub_id)(["me.jpg"])`` is a LoRA for ``layout.base``. ``card["base"]`` is
    where a model that looks through its base finds it: a hub id, or a path relative to the model's folder;
    ``card["strength"]`` was chosen on validation people (``benchmarks/choose_strength.py``). ``fit_ood`` tells photos
    like those it was trained on from others, where its folder holds one.
    """

    def __init__(
        self, encoder: Encoder, hypernetwork: Hypernetwork, card: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.hypernetwork = encoder, hypernetwork
        self.card = card or {}

    @property
    def layout(self) -> LoraLayout:
        return self.hypernetwork.layout

    def to_config(self) -> dict[str, Any]:
        return {"encoder": self.encoder.config, "hypernetwork": self.hypernetwork.config}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: DiffusionBase | None
    ) -> Self:
        return cls(
            _make_encoder(config, folder, base), Hypernetwork(layout, **config["hypernetwork"])
        )

    def generate_from_features(
        self, features: ImageFeatures, sampling: SamplingConfig | None = None
    ) -> LoraWeights:
        """One LoRA per subject (batch axis) from what the encoder says; nothing is left to chance."""
        return self.apply_strength(self.hypernetwork(features))

    @torch.no_grad()
    def encode_photos(self, photos: Tensor) -> ImageFeatures:
        """The encoder is frozen everywhere: its features never carry gradients."""
        return self.encoder(photos)


def _make_encoder(config: dict[str, Any], folder: Path, base: DiffusionBase | None) -> Encoder:
    options = dict(config["encoder"])
    if options["name"] != "denoiser":
        return TimmEncoder(**options)
    if base is None:
        base_name_or_path = config["card"]["base"]
        base = load_diffusion_base(
            folder / base_name_or_path
            if (folder / base_name_or_path).is_dir()
            else base_name_or_path
        )
    del options["name"]
    return make_unet_encoder(base, **options)
