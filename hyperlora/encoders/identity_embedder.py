"""``IdentityEmbedder``: who is in a picture, as the photo encoder of a released model sees it."""

import os
from pathlib import Path
from typing import Final, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.encoders.sidecar import compute_encoder_fingerprint, read_sidecar
from hyperlora.encoders.timm_encoder import TimmEncoder

IDENTITY_EMBEDDER_FILE: Final = "identity.safetensors"


class IdentityEmbedder:
    """A linear map from what ``encoder`` sees to an identity space; it can be differentiated, so that a LoRA can be
    held to a person (``refine_identity``). ``weight`` [width, features], ``bias`` [width]."""

    def __init__(self, encoder: TimmEncoder, weight: Tensor, bias: Tensor) -> None:
        self.encoder, self.weight, self.bias = encoder, weight, bias

    def __call__(self, images: Tensor) -> Tensor:
        """pictures [n, 3, h, w] in [0, 1] to identities [n, width] of unit length."""
        features = self.encoder.compute_pooled_features(images)
        return F.normalize(
            F.linear(features, self.weight.to(features), self.bias.to(features)), dim=-1
        )

    @torch.no_grad()
    def embed_subjects(self, photos: Tensor) -> Tensor:
        """Of subjects, [k, views, 3, h, w] to [k, width]: the mean of their photos."""
        return F.normalize(
            self(photos.flatten(0, 1)).unflatten(0, photos.shape[:2]).mean(1), dim=-1
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``sample_identity.safetensors`` (fp16) into the folder of the model."""
        tensors = {"weight": self.weight.half().contiguous(), "bias": self.bias.half().contiguous()}
        save_file(
            tensors,
            Path(folder) / IDENTITY_EMBEDDER_FILE,
            {"encoder": compute_encoder_fingerprint(self.encoder)},
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder: nn.Module) -> Self | None:
        """What ``save`` wrote, or None where nothing is. Raises ``ModelLoadError`` if it is damaged or of another
        ``encoder``."""
        rebuild_hint = "make it again with `python -m data_builder identity`"
        sidecar = read_sidecar(
            Path(folder) / IDENTITY_EMBEDDER_FILE, ("weight", "bias"), encoder, rebuild_hint
        )
        if sidecar is None or not isinstance(encoder, TimmEncoder):
            return None
        tensors, _ = sidecar
        return cls(encoder, tensors["weight"], tensors["bias"])
