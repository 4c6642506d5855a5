"""Networks that make LoRAs. They know neither diffusers nor timm: features in, ``LoraWeights`` out."""

from hyperlora.models.autoencoder import LoraAutoencoder
from hyperlora.models.change import ChangeNetwork
from hyperlora.models.components import LinearAutoencoder, PartedAutoencoder
from hyperlora.models.denoiser import LoraDenoiser
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.models.mixture import MixtureOfFeatures

__all__ = [
    "ChangeNetwork",
    "Hypernetwork",
    "LinearAutoencoder",
    "LoraAutoencoder",
    "LoraDenoiser",
    "MixtureOfFeatures",
    "PartedAutoencoder",
]
