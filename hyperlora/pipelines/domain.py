"""``Domain``: what pictures a photo encoder's model was trained on, and how far a photo lies from them."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperlora.errors import BadArtifact
from hyperlora.features import ImageFeatures

FILE: Final = "domain.safetensors"
_RIDGE: Final = 0.01
"""Added to every variance, as a part of their mean: directions that hardly vary in training say little."""


@dataclass(frozen=True)
class Domain:
    """A Gaussian around the features of training pictures (Mahalanobis distance, 1807.03888).

    A photo's features are its tokens' mean [width]; ``mean`` [width] and ``whitening`` [width, width] turn them into
    uncorrelated numbers of variance at most one. Photos up to ``farthest`` from the mean are known. ``subjects`` is
    what people call the pictures, ``encoder`` the digest of the network whose features they are.
    """

    mean: Tensor
    whitening: Tensor
    farthest: float
    subjects: str
    encoder: str

    @classmethod
    def of(cls, training: Tensor, held_out: Tensor, subjects: str, encoder: str, passing: float = 0.995) -> Self:
        """From pooled features [n, width] of training pictures; the fraction ``passing`` of the ``held_out`` is known."""
        training = training.double()
        mean = training.mean(0)
        variance, axes = torch.linalg.eigh((training - mean).mT @ (training - mean) / len(training))
        whitening = axes / (variance.clamp(min=0) + _RIDGE * variance.mean()).sqrt()
        found = cls(mean.float(), whitening.half().float(), 0.0, subjects, encoder)
        farthest = float(found.distances(held_out).quantile(passing))
        return cls(found.mean, found.whitening, farthest, subjects, encoder)

    def distances(self, pooled: Tensor) -> Tensor:
        """[..., width] to [...]."""
        return ((pooled.cpu() - self.mean) @ self.whitening).norm(dim=-1)

    def known(self, features: ImageFeatures) -> Tensor:
        """Whether each photo looks like the training pictures, [batch, views]."""
        return self.distances(pooled(features)) <= self.farthest

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``domain.safetensors`` (fp16 whitening) into the folder of the model."""
        facts = {"subjects": self.subjects, "encoder": self.encoder, "farthest": repr(self.farthest)}
        tensors = {"mean": self.mean, "whitening": self.whitening.half()}
        save_file(tensors, Path(folder) / FILE, facts)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder: nn.Module) -> Self | None:
        """What ``save`` wrote, or None where nothing is. Raises ``BadArtifact`` if it is damaged or of another
        ``encoder``."""
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        again = "make it again with `python -m data_builder domain`"
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata()
                tensors = {name: file.get_tensor(name).float() for name in ("mean", "whitening")}
            found = cls(
                **tensors, farthest=float(facts["farthest"]), subjects=facts["subjects"], encoder=facts["encoder"]
            )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BadArtifact(f"{path} is damaged: {again}") from error
        if found.encoder != digest(encoder):
            raise BadArtifact(f"{path} belongs to another photo encoder than the model beside it: {again}")
        return found


def pooled(features: ImageFeatures) -> Tensor:
    """[batch, views, tokens, width] to [batch, views, width]."""
    return features.tokens.mean(-2)


def digest(encoder: nn.Module) -> str:
    """16 hexadecimal digits of an encoder's weights, as they are released (fp16)."""
    found = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
