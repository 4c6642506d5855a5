"""``OodDetector``: whether a photo resembles the images on which a model was trained."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.encoders.sidecar import FINGERPRINT_KEY, read_sidecar
from hyperlora.errors import ModelLoadError
from hyperlora.features import ImageFeatures

OOD_DETECTOR_FILE: Final = "domain.safetensors"
_MAX_TOKEN_GROUPS: Final = 4
_TENSOR_NAMES: Final = ("mean", "components", "explained_variance")


@dataclass(frozen=True)
class OodDetector:
    """A Gaussian of pooled features of training photos, by probabilistic PCA (Tipping and Bishop).

    Its covariance has the variances of ``components`` and one variance in all other directions.
    The Mahalanobis distance detects other photos, on features of unit length much better than on
    raw ones (2505.18032).

    Attributes:
        mean: [width].
        components: Principal components, orthonormal columns, [width, components].
        explained_variance: Their variances, [components].
        noise_variance: The variance in every other direction.
        threshold: Squared distance up to which a photo is in the domain.
        domain_name: What users call the training images, e.g. ``avatars``.
        encoder_fingerprint: The fingerprint of the photo encoder.
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
        """Fit the Gaussian on training photos and the threshold on validation photos.

        Args:
            train_features: Pooled features, [n, width].
            val_features: Pooled features of photos of other subjects, [m, width].
            domain_name: What users call the images.
            encoder_fingerprint: The fingerprint of the photo encoder.
            num_components: Number of principal components, at most half the width.
            pass_rate: Fraction of the validation photos within the threshold.

        Returns:
            The detector.
        """
        num_components = min(num_components, train_features.shape[1] // 2)
        mean = train_features.mean(0)  # [width]
        centered = train_features - mean  # [n, width]
        covariance = centered.mT @ centered / len(train_features)  # [width, width]
        variances, components = torch.linalg.eigh(covariance)  # ascending, [width], [width, width]
        variances, components = variances.flip(0).clamp(min=0), components.flip(1)
        # maximum likelihood: the mean of the remaining eigenvalues
        noise_variance = float(variances[num_components:].mean())
        detector = cls(
            mean,
            components[:, :num_components].half().float(),
            variances[:num_components],
            noise_variance,
            0.0,
            domain_name,
            encoder_fingerprint,
        )
        threshold = float(detector.compute_distances(val_features).quantile(pass_rate))
        return replace(detector, threshold=threshold)

    def compute_distances(self, features: Tensor) -> Tensor:
        """Compute squared Mahalanobis distances.

        Σ_k (u_kᵀ x)² / λ_k  +  (‖x‖² - Σ_k (u_kᵀ x)²) / σ²,  x = features - mean

        Args:
            features: Pooled features, [*batch, width].

        Returns:
            [*batch].
        """
        centered = features.cpu() - self.mean  # [*batch, width]
        squared_projections = (centered @ self.components).square()  # [*batch, components]
        inside = (squared_projections / self.explained_variance).sum(-1)  # [*batch]
        residual = centered.square().sum(-1) - squared_projections.sum(-1)  # [*batch]
        return inside + residual / self.noise_variance

    def is_in_domain(self, features: ImageFeatures) -> Tensor:
        """Test whether each photo resembles the training images.

        Returns:
            Booleans [batch, views].
        """
        return self.compute_distances(pool_features(features)) <= self.threshold

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``domain.safetensors`` into the folder of the model."""
        tensors = {
            "mean": self.mean,
            "components": self.components.half().contiguous(),
            "explained_variance": self.explained_variance,
        }
        metadata = {
            "noise_variance": repr(self.noise_variance),
            "threshold": repr(self.threshold),
            "domain_name": self.domain_name,
            FINGERPRINT_KEY: self.encoder_fingerprint,
        }
        save_file(tensors, Path(folder) / OOD_DETECTOR_FILE, metadata)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder: nn.Module) -> Self | None:
        """Load what ``save`` wrote.

        Args:
            folder: The folder of the model.
            encoder: The photo encoder of the model.

        Returns:
            The detector, or None if there is no file.

        Raises:
            ModelLoadError: The file is damaged or belongs to another encoder.
        """
        path = Path(folder) / OOD_DETECTOR_FILE
        rebuild_hint = "make it again with `python -m data_builder fit-ood`"
        sidecar = read_sidecar(path, _TENSOR_NAMES, encoder, rebuild_hint)
        if sidecar is None:
            return None
        tensors, metadata = sidecar
        try:
            return cls(
                mean=tensors["mean"],
                components=tensors["components"],
                explained_variance=tensors["explained_variance"],
                noise_variance=float(metadata["noise_variance"]),
                threshold=float(metadata["threshold"]),
                domain_name=metadata["domain_name"],
                encoder_fingerprint=metadata[FINGERPRINT_KEY],
            )
        except (KeyError, ValueError) as error:
            raise ModelLoadError(f"{path} is damaged: {rebuild_hint}") from error


def pool_features(features: ImageFeatures) -> Tensor:
    """Pool each photo to one vector of unit length: the means of up to four groups of tokens.

    Returns:
        [batch, views, groups * width].
    """
    tokens = features.tokens.flatten(0, 1).float()  # [n, tokens, width]
    if tokens.shape[1] > _MAX_TOKEN_GROUPS:
        tokens = F.adaptive_avg_pool1d(tokens.mT, _MAX_TOKEN_GROUPS).mT  # [n, groups, width]
    pooled = F.normalize(tokens.flatten(1), dim=-1)  # [n, groups * width]
    return pooled.unflatten(0, features.tokens.shape[:2])
