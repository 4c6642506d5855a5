"""Photos to ``ImageFeatures``; and the reader that names what a photo shows."""

from hyperlora.encoders.denoiser import DenoiserEncoder
from hyperlora.encoders.reader import Reader, Reading, photo_encoder
from hyperlora.encoders.vision import VisionEncoder

__all__ = ["DenoiserEncoder", "Reader", "Reading", "VisionEncoder", "photo_encoder"]
