"""``AttributeClassifier``: names a portrait's attributes and places its subject in an identity space."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidArgumentError, ModelLoadError


@dataclass(frozen=True)
class AttributePrediction:
    """``logits`` per attribute [n, classes]; ``geometry`` [n, measures]; ``sample_identity`` [n, width] of unit length."""

    logits: Mapping[str, Tensor]
    geometry: Tensor
    identity: Tensor


class AttributeClassifier(nn.Module):
    """A backbone with one linear head per attribute, one for face geometry and one for identity.

    ``attributes`` maps each attribute to its class names; ``geometry`` names the measures. ``backbone`` is a timm id,
    or ``latents`` for a reader of scaled latents instead of pictures. ``identity_scale`` holds the mean cosines of real
    photos of different people and of the same person, once they are measured.
    """

    def __init__(
        self,
        backbone: str,
        image_size: int,
        attributes: Mapping[str, Sequence[str]],
        geometry: Sequence[str] = (),
        identity_width: int = 64,
        options: dict[str, Any] | None = None,
        identity_scale: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.identity_scale = identity_scale
        self.attributes = {name: tuple(classes) for name, classes in attributes.items()}
        self.geometry = tuple(geometry)
        self.encoder = make_backbone(backbone, image_size, options)
        self.config = {
            "backbone": backbone,
            "image_size": image_size,
            "attributes": {k: list(v) for k, v in self.attributes.items()},
            "geometry": list(geometry),
            "identity_width": identity_width,
            "options": options or {},
        }
        width = self.encoder.width
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, len(c)) for name, c in self.attributes.items()}
        )
        self.geometry_head = nn.Linear(width, max(1, len(self.geometry)))
        self.identity_head = nn.Linear(width, identity_width)

    def forward(self, images: Tensor) -> AttributePrediction:
        """images [n, 3, h, w] in [0, 1], or latents."""
        pooled_features = self.encoder.compute_pooled_features(images)
        identity = F.normalize(self.identity_head(pooled_features), dim=-1)
        return AttributePrediction(
            {k: head(pooled_features) for k, head in self.heads.items()},
            self.geometry_head(pooled_features),
            identity,
        )

    def predict_labels(self, prediction: AttributePrediction) -> list[dict[str, str]]:
        """The most likely class of every attribute, one dictionary per image."""
        class_indices = {k: v.argmax(-1).tolist() for k, v in prediction.logits.items()}
        num_images = len(prediction.identity)
        return [
            {k: self.attributes[k][class_indices[k][i]] for k in class_indices}
            for i in range(num_images)
        ]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` (fp16)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        identity_config = {"identity_scale": self.identity_scale} if self.identity_scale else {}
        (folder / "config.json").write_text(json.dumps(self.config | identity_config, indent=1))
        save_file(
            {k: v.half().contiguous() for k, v in self.state_dict().items()},
            folder / "model.safetensors",
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> "AttributeClassifier":
        """Read what ``save_pretrained`` wrote. Raises ``ModelLoadError`` if the folder holds no reader."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ModelLoadError(
                f"{folder} holds no reader: config.json and model.safetensors expected"
            )
        classifier = cls(**json.loads((folder / "config.json").read_text()))
        classifier.load_state_dict(
            {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        )
        return classifier.eval().requires_grad_(False)


def load_image_encoder(name_or_path: str, options: dict[str, Any] | None = None) -> TimmEncoder:
    """What a released reader of pictures (a folder) looks through, or the timm backbone ``name_or_path``; ``options`` are
    ``TimmEncoder``'s (of a reader's, ``colours`` may be given).

    Raises ``InvalidArgumentError`` for a reader of latents.
    """
    if not (Path(name_or_path) / "config.json").is_file():
        return TimmEncoder(name_or_path, **(options or {}))
    backbone = AttributeClassifier.from_pretrained(name_or_path).encoder
    if not isinstance(backbone, TimmEncoder):
        raise InvalidArgumentError(
            f"{name_or_path} reads latents, a reader of pictures was expected"
        )
    encoder = TimmEncoder(**(backbone.config | (options or {})))
    encoder.load_state_dict(backbone.state_dict())
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def predict_in_batches(
    classifier: AttributeClassifier, images: Tensor, batch_size: int = 64
) -> AttributePrediction:
    """``classifier(images)`` on many images without keeping activations."""
    predictions = [classifier(batch) for batch in images.split(batch_size)]
    return AttributePrediction(
        {
            k: torch.cat([prediction.logits[k] for prediction in predictions])
            for k in predictions[0].logits
        },
        torch.cat([prediction.geometry for prediction in predictions]),
        torch.cat([prediction.identity for prediction in predictions]),
    )


LATENT_BACKBONE = "latents"
"""The backbone's name that stands for ``LatentResNet``."""


class LatentResNet(nn.Module):
    """Scaled latents [n, channels, size, size] of pictures to a pooled feature [n, 256]; places stay apart in it, as
    the parts of a portrait are few latents."""

    width = 256

    def __init__(self, latent_size: int, channels: int, base_channels: int = 64) -> None:
        super().__init__()
        self.image_size = latent_size
        self.body = nn.Sequential(
            nn.Conv2d(channels, base_channels, 3, padding=1),
            _ResidualBlock(base_channels),
            _ResidualBlock(base_channels),
            nn.Conv2d(base_channels, 2 * base_channels, 3, stride=2, padding=1),
            _ResidualBlock(2 * base_channels),
            _ResidualBlock(2 * base_channels),
            nn.Conv2d(2 * base_channels, 2 * base_channels, 3, stride=2, padding=1),
            _ResidualBlock(2 * base_channels),
            nn.Conv2d(2 * base_channels, 48, 1),
        )
        side = (latent_size + 3) // 4
        self.pool = nn.Sequential(nn.Flatten(), nn.Linear(48 * side * side, self.width), nn.GELU())

    def compute_pooled_features(self, latents: Tensor) -> Tensor:
        """[n, width]."""
        return self.pool(self.body(latents))


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(F.silu(norm(h)))
        return x + h


def make_backbone(
    backbone: str, image_size: int, options: dict[str, Any] | None
) -> TimmEncoder | LatentResNet:
    """The trunk of a name: ``latents`` (options ``channels``, ``base_channels``) or a timm id (options of it)."""
    if backbone == LATENT_BACKBONE:
        return LatentResNet(image_size, **(options or {}))
    return TimmEncoder(backbone, image_size, options=options)
