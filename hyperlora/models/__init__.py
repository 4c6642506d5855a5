"""Networks that make LoRAs. They know neither diffusers nor timm: features in, ``LoraWeights`` out."""

from hyperlora.models.change import ChangeNetwork
from hyperlora.models.hypernetwork import Hypernetwork

__all__ = ["ChangeNetwork", "Hypernetwork"]
