"""``OodDetector``: what pictures a photo encoder's model was trained on, and how far a photo lies from them."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.encoders.sidecar import read_sidecar
from hyperlora.errors import ModelLoadError
from hyperlora.features import ImageFeatures

OOD_DETECTOR_FILE: Final = "domain.safetensors"
_MAX_TOKEN_GROUPS: Final = 4
_TENSOR_NAMES: Final = ("mean", "axes", "variances")


@dataclass(frozen=True)
class OodDetector:
    """A Gaussian around the described photos of training: ``components`` with their variances, and ``noise_variance``, one variance for
    all other directions (probabilistic PCA). Its Mahalanobis distance tells other photos, on features of unit length
    much better than on raw ones (2505.18032).

    ``mean`` [width], ``components`` [width, kept], ``explained_variance`` [kept]. Photos up to ``threshold`` are known. ``domain_name`` is
    what people call the pictures, ``encoder_fingerprint`` the digest of the network that sees them.
    """

    mean: Tensor
    components: Tensor
    explained_variance: Tensor
    noise_variance: float
    threshold: float
    domain_name: str
    encoder_fingerprint: str

    @classmethod
    def fit(
        cls,
        train_features: Tensor,
        val_features: Tensor,
        domain_name: str,
        encoder_fingerprint: str,
        num_components: int = 90,
        pass_rate: float = 0.995,
    ) -> Self:
        """From described photos [n, width] of training; the fraction ``pass_rate`` of those ``val_features`` is known."""
        mean, num_components = (
            train_features.mean(0),
            min(num_components, train_features.shape[1] // 2),
        )
        explained_variance, components = torch.linalg.eigh(
            (train_features - mean).mT @ (train_features - mean) / len(train_features)
        )
        explained_variance, components = explained_variance.flip(0).clamp(min=0), components.flip(1)
        noise_variance = float(explained_variance[num_components:].mean())
        detector = cls(
            mean,
            components[:, :num_components].half().float(),
            explained_variance[:num_components],
            noise_variance,
            0.0,
            domain_name,
            encoder_fingerprint,
        )
        return replace(
            detector, farthest=float(detector.compute_distances(val_features).quantile(pass_rate))
        )

    def compute_distances(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distances, [..., width] to [...]."""
        centered = features.cpu() - self.mean
        squared_projections = (centered @ self.components).square()
        return (squared_projections / self.explained_variance).sum(-1) + (
            centered.square().sum(-1) - squared_projections.sum(-1)
        ) / self.noise_variance

    def is_in_domain(self, features: ImageFeatures) -> Tensor:
        """Whether each photo looks like the training pictures, [batch, views]."""
        return self.compute_distances(pool_features(features)) <= self.threshold

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``domain.safetensors`` into the folder of the model."""
        metadata = {"rest": repr(self.noise_variance), "farthest": repr(self.threshold)}
        tensors = {
            "mean": self.mean,
            "axes": self.components.half().contiguous(),
            "variances": self.explained_variance,
        }
        save_file(
            tensors,
            Path(folder) / OOD_DETECTOR_FILE,
            metadata | {"subjects": self.domain_name, "encoder": self.encoder_fingerprint},
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder: nn.Module) -> Self | None:
        """What ``save`` wrote, or None where nothing is. Raises ``ModelLoadError`` if it is damaged or of another
        ``encoder_fingerprint``."""
        path, rebuild_hint = (
            Path(folder) / OOD_DETECTOR_FILE,
            "make it again with `python -m data_builder domain`",
        )
        sidecar = read_sidecar(path, _TENSOR_NAMES, encoder, rebuild_hint)
        if sidecar is None:
            return None
        tensors, metadata = sidecar
        try:
            noise_variance, threshold = float(metadata["rest"]), float(metadata["farthest"])
            return cls(
                **tensors,
                rest=noise_variance,
                farthest=threshold,
                subjects=metadata["subjects"],
                encoder=metadata["encoder"],
            )
        except (KeyError, ValueError) as error:
            raise ModelLoadError(f"{path} is damaged: {rebuild_hint}") from error


def pool_features(features: ImageFeatures) -> Tensor:
    """Each photo in one vector of unit length, [batch, views, width]: the means of up to four groups of tokens."""
    tokens = features.tokens.flatten(0, 1).float()
    if tokens.shape[1] > _MAX_TOKEN_GROUPS:
        tokens = F.adaptive_avg_pool1d(tokens.mT, _MAX_TOKEN_GROUPS).mT
    return F.normalize(tokens.flatten(1), dim=-1).unflatten(0, features.tokens.shape[:2])
