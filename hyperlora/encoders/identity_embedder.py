"""``IdentityEmbedder``: identities of images by the photo encoder of a released model."""

import os
from pathlib import Path
from typing import Final, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.encoders.sidecar import (
    FINGERPRINT_KEY,
    compute_encoder_fingerprint,
    read_sidecar,
)
from hyperlora.encoders.timm_encoder import TimmEncoder

IDENTITY_EMBEDDER_FILE: Final = "identity.safetensors"


class IdentityEmbedder:
    """A linear map from pooled features of an encoder to identities.

    It is differentiable, so ``refine_identity`` can use it as a loss.

    Args:
        encoder: The photo encoder of the model.
        weight: [width, features].
        bias: [width].
    """

    def __init__(self, encoder: TimmEncoder, weight: Tensor, bias: Tensor) -> None:
        self.encoder, self.weight, self.bias = encoder, weight, bias

    def __call__(self, images: Tensor) -> Tensor:
        """Embed images [n, 3, height, width] in [0, 1] to identities [n, width] of unit length."""
        features = self.encoder.compute_pooled_features(images)  # [n, features]
        weight, bias = self.weight.to(features), self.bias.to(features)
        return F.normalize(F.linear(features, weight, bias), dim=-1)

    @torch.no_grad()
    def embed_subjects(self, photos: Tensor) -> Tensor:
        """Average the identities of each subject's photos.

        Args:
            photos: [subjects, views, 3, height, width] in [0, 1].

        Returns:
            [subjects, width] of unit length.
        """
        embeds = self(photos.flatten(0, 1)).unflatten(0, photos.shape[:2])  # [subjects, views, w]
        return F.normalize(embeds.mean(1), dim=-1)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``identity.safetensors`` (float16) into the folder of the model."""
        tensors = {"weight": self.weight.half().contiguous(), "bias": self.bias.half().contiguous()}
        metadata = {FINGERPRINT_KEY: compute_encoder_fingerprint(self.encoder)}
        save_file(tensors, Path(folder) / IDENTITY_EMBEDDER_FILE, metadata)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder: nn.Module) -> Self | None:
        """Load what ``save`` wrote.

        Args:
            folder: The folder of the model.
            encoder: The photo encoder of the model.

        Returns:
            The embedder, or None if there is no file or the encoder is no ``TimmEncoder``.

        Raises:
            ModelLoadError: The file is damaged or belongs to another encoder.
        """
        path = Path(folder) / IDENTITY_EMBEDDER_FILE
        rebuild_hint = "make it again with `python -m data_builder export-identity`"
        sidecar = read_sidecar(path, ("weight", "bias"), encoder, rebuild_hint)
        if sidecar is None or not isinstance(encoder, TimmEncoder):
            return None
        tensors, _ = sidecar
        return cls(encoder, tensors["weight"], tensors["bias"])
