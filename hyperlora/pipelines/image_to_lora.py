"""``ImageToLora``: photos of a subject in, LoRA weights out, in one forward pass."""

from pathlib import Path
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor

from hyperlora.compute import ComputeConfig
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base, make_unet_encoder
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import ModelLoadError
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.image_to_lora_base import EncodedPhotos, ImageEncoder, ImageToLoraBase
from hyperlora.pipelines.model_card import ModelCard

_UNET_ENCODER_NAME: Final = "unet"
"""The name of ``UNetFeatureEncoder`` in ``config.json``; any other name is timm's."""


class ImageToLora(ImageToLoraBase):
    """An image encoder and the hypernetwork that it conditions, after HyperDreamBooth (2307.06949).

    Example: ``ImageToLora.from_pretrained(folder_or_hub_id)(["me.jpg"]).save("me.safetensors")``
    writes a LoRA for the base ``layout.base``.

    Args:
        encoder: The image encoder, frozen.
        hypernetwork: The network from image features to LoRA weights.
        card: License, trigger phrase and strength. ``card.base`` is the base of a
            ``UNetFeatureEncoder``.
    """

    method: ClassVar[str] = "hypernetwork"

    def __init__(
        self, encoder: ImageEncoder, hypernetwork: Hypernetwork, card: ModelCard | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.hypernetwork = encoder, hypernetwork
        self.card = card or ModelCard()

    @property
    def layout(self) -> LoraLayout:
        """The layout of the LoRAs."""
        return self.hypernetwork.layout

    def to_config(self) -> dict[str, Any]:
        """Return the arguments of the encoder and the hypernetwork."""
        return {"encoder": self.encoder.config, "hypernetwork": self.hypernetwork.config}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: DiffusionBase | None
    ) -> Self:
        """Build the network with random weights.

        Args:
            config: The content of ``config.json``.
            layout: The layout of the LoRAs.
            folder: The model's folder.
            base: The base of a ``UNetFeatureEncoder``.

        Returns:
            The network.

        Raises:
            ModelLoadError: A ``UNetFeatureEncoder`` has no base.
        """
        options = dict(config["encoder"])
        encoder: ImageEncoder
        if options["name"] != _UNET_ENCODER_NAME:
            encoder = TimmEncoder(**options)
        elif base is None:
            raise ModelLoadError(f"{folder} encodes photos with its base: give the base too")
        else:
            del options["name"]
            encoder = make_unet_encoder(base, **options)
        return cls(encoder, Hypernetwork(layout, **config["hypernetwork"]))

    @classmethod
    def load_encoder_base(
        cls, config: dict[str, Any], folder: Path, compute: ComputeConfig | None = None
    ) -> DiffusionBase | None:
        """Load the base of a ``UNetFeatureEncoder`` by ``card.base``.

        Args:
            config: The content of ``config.json``.
            folder: The model's folder, where a relative path of ``card.base`` begins.
            compute: Device and precision of the base.

        Returns:
            The base; None for another encoder, or a card without base.
        """
        name_or_path = ModelCard.from_dict(config["card"]).base
        if config["encoder"]["name"] != _UNET_ENCODER_NAME or not name_or_path:
            return None
        base_dir = folder / name_or_path
        return load_diffusion_base(base_dir if base_dir.is_dir() else name_or_path, compute)

    def generate_from_features(
        self, features: EncodedPhotos, sampling: LoraSampling | None = None
    ) -> LoraWeights:
        """Generate the LoRAs of several subjects from encoded photos.

        Args:
            features: What ``encode_photos`` returns.
            sampling: Ignored; the network is deterministic.

        Returns:
            One LoRA per subject (batch axis).
        """
        return self.apply_strength(self.hypernetwork(features.image))

    @torch.no_grad()
    def encode_photos(self, photos: Tensor) -> EncodedPhotos:
        """Encode the photos of several subjects; the encoder is frozen, so without gradients.

        Args:
            photos: [batch, views, 3, size, size] in [0, 1].

        Returns:
            The image features [batch, views, tokens, width].
        """
        return EncodedPhotos(self.encoder(photos))
