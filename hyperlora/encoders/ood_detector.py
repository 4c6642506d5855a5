"""``Domain``: what pictures a photo encoder's model was trained on, and how far a photo lies from them."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.encoders.sidecar import read_beside
from hyperlora.errors import BadArtifact
from hyperlora.features import ImageFeatures

FILE: Final = "domain.safetensors"
_GROUPS: Final = 4
_TENSORS: Final = ("mean", "axes", "variances")


@dataclass(frozen=True)
class Domain:
    """A Gaussian around the described photos of training: ``axes`` with their variances, and ``rest``, one variance for
    all other directions (probabilistic PCA). Its Mahalanobis distance tells other photos, on features of unit length
    much better than on raw ones (2505.18032).

    ``mean`` [width], ``axes`` [width, kept], ``variances`` [kept]. Photos up to ``farthest`` are known. ``subjects`` is
    what people call the pictures, ``encoder`` the digest of the network that sees them.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor
    rest: float
    farthest: float
    subjects: str
    encoder: str

    @classmethod
    def of(
        cls, training: Tensor, held_out: Tensor, subjects: str, encoder: str, kept: int = 90, passing: float = 0.995
    ) -> Self:
        """From described photos [n, width] of training; the fraction ``passing`` of those ``held_out`` is known."""
        mean, kept = training.mean(0), min(kept, training.shape[1] // 2)
        variances, axes = torch.linalg.eigh((training - mean).mT @ (training - mean) / len(training))
        variances, axes = variances.flip(0).clamp(min=0), axes.flip(1)
        rest = float(variances[kept:].mean())
        found = cls(mean, axes[:, :kept].half().float(), variances[:kept], rest, 0.0, subjects, encoder)
        return replace(found, farthest=float(found.distances(held_out).quantile(passing)))

    def distances(self, described: Tensor) -> Tensor:
        """Squared Mahalanobis distances, [..., width] to [...]."""
        centred = described.cpu() - self.mean
        along = (centred @ self.axes).square()
        return (along / self.variances).sum(-1) + (centred.square().sum(-1) - along.sum(-1)) / self.rest

    def known(self, features: ImageFeatures) -> Tensor:
        """Whether each photo looks like the training pictures, [batch, views]."""
        return self.distances(described(features)) <= self.farthest

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``domain.safetensors`` into the folder of the model."""
        numbers = {"rest": repr(self.rest), "farthest": repr(self.farthest)}
        tensors = {"mean": self.mean, "axes": self.axes.half().contiguous(), "variances": self.variances}
        save_file(tensors, Path(folder) / FILE, numbers | {"subjects": self.subjects, "encoder": self.encoder})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder: nn.Module) -> Self | None:
        """What ``save`` wrote, or None where nothing is. Raises ``BadArtifact`` if it is damaged or of another
        ``encoder``."""
        path, again = Path(folder) / FILE, "make it again with `python -m data_builder domain`"
        found = read_beside(path, _TENSORS, encoder, again)
        if found is None:
            return None
        tensors, facts = found
        try:
            rest, farthest = float(facts["rest"]), float(facts["farthest"])
            return cls(**tensors, rest=rest, farthest=farthest, subjects=facts["subjects"], encoder=facts["encoder"])
        except (KeyError, ValueError) as error:
            raise BadArtifact(f"{path} is damaged: {again}") from error


def described(features: ImageFeatures) -> Tensor:
    """Each photo in one vector of unit length, [batch, views, width]: the means of up to four groups of tokens."""
    tokens = features.tokens.flatten(0, 1).float()
    if tokens.shape[1] > _GROUPS:
        tokens = F.adaptive_avg_pool1d(tokens.mT, _GROUPS).mT
    return F.normalize(tokens.flatten(1), dim=-1).unflatten(0, features.tokens.shape[:2])
