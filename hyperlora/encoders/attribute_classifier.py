"""``AttributeClassifier``: attributes, face geometry and identity of portraits."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidArgumentError, ModelLoadError

LATENT_BACKBONE: Final = "latents"
"""The backbone's name that stands for ``LatentResNet``."""


class AttributeClassifierConfig(TypedDict):
    """The arguments that rebuild an ``AttributeClassifier``, without its identity scale."""

    backbone: str
    image_size: int
    attributes: dict[str, list[str]]
    geometry: list[str]
    identity_width: int
    options: dict[str, Any]


@dataclass(frozen=True)
class AttributePrediction:
    """Outputs of an ``AttributeClassifier`` for n images.

    Attributes:
        logits: Per attribute, [n, classes].
        geometry: Measures of the face, [n, measures].
        identity: [n, width] of unit length.
    """

    logits: Mapping[str, Tensor]
    geometry: Tensor
    identity: Tensor


class AttributeClassifier(nn.Module):
    """A backbone with linear heads: one per attribute, one for geometry and one for identity.

    Args:
        backbone: A timm id, or ``LATENT_BACKBONE`` for scaled latents instead of images.
        image_size: Height and width of the images in pixels, or of the latents.
        attributes: The class names of every attribute.
        geometry: The names of the measures of a face.
        identity_width: Numbers per identity.
        options: Further arguments of the backbone.
        identity_scale: Mean cosine of photos of different subjects and of one subject, if known.

    Attributes:
        config: The arguments that rebuild the classifier, without ``identity_scale``.
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
        self.config: AttributeClassifierConfig = {
            "backbone": backbone,
            "image_size": image_size,
            "attributes": {name: list(classes) for name, classes in self.attributes.items()},
            "geometry": list(geometry),
            "identity_width": identity_width,
            "options": options or {},
        }
        width = self.encoder.width
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, len(classes)) for name, classes in self.attributes.items()}
        )
        self.geometry_head = nn.Linear(width, max(1, len(self.geometry)))
        self.identity_head = nn.Linear(width, identity_width)

    def forward(self, images: Tensor) -> AttributePrediction:
        """Classify images.

        Args:
            images: [n, 3, height, width] in [0, 1], or scaled latents [n, channels, size, size];
                on any device.

        Returns:
            The outputs of all heads, on the device of the classifier.
        """
        features = self.encoder.compute_pooled_features(images)  # [n, width]
        logits = {name: head(features) for name, head in self.heads.items()}  # [n, classes]
        geometry = self.geometry_head(features)  # [n, measures]
        identity = F.normalize(self.identity_head(features), dim=-1)  # [n, identity_width]
        return AttributePrediction(logits, geometry, identity)

    def predict_labels(self, prediction: AttributePrediction) -> list[dict[str, str]]:
        """Convert logits to the most likely class names.

        Returns:
            Per image, the class of every attribute.
        """
        class_indices = {
            name: logits.argmax(-1).tolist() for name, logits in prediction.logits.items()
        }
        num_images = len(prediction.identity)
        return [
            {name: self.attributes[name][indices[i]] for name, indices in class_indices.items()}
            for i in range(num_images)
        ]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` (float16)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        scale = {"identity_scale": self.identity_scale} if self.identity_scale else {}
        (folder / "config.json").write_text(json.dumps({**self.config, **scale}, indent=1))
        save_file(
            {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()},
            folder / "model.safetensors",
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> "AttributeClassifier":
        """Load what ``save_pretrained`` wrote, frozen and in evaluation mode.

        Raises:
            ModelLoadError: The folder holds no classifier.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ModelLoadError(
                f"{folder} holds no attribute classifier: "
                f"config.json and model.safetensors expected"
            )
        classifier = cls(**json.loads((folder / "config.json").read_text()))
        state_dict = load_file(folder / "model.safetensors")
        classifier.load_state_dict({name: tensor.float() for name, tensor in state_dict.items()})
        return classifier.eval().requires_grad_(False)


def load_image_encoder(name_or_path: str, options: dict[str, Any] | None = None) -> TimmEncoder:
    """Load the backbone of a released network, or make a timm backbone.

    Args:
        name_or_path: The folder of an attribute classifier or of a model from photos, or a timm
            id.
        options: Further arguments of ``TimmEncoder``; for a folder, they replace its own.

    Returns:
        The encoder.

    Raises:
        InvalidArgumentError: The classifier is one of latents.
        ModelLoadError: The model takes its encoder from another one.
    """
    config_path = Path(name_or_path) / "config.json"
    if not config_path.is_file():
        return TimmEncoder(name_or_path, **(options or {}))
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if "encoder" in config:  # of a model from photos
        encoder_config, state_dict = config["encoder"], _load_encoder_weights(config_path)
    else:
        backbone = AttributeClassifier.from_pretrained(name_or_path).encoder
        if not isinstance(backbone, TimmEncoder):
            raise InvalidArgumentError(
                f"{name_or_path} classifies latents, an attribute classifier of images was expected"
            )
        encoder_config, state_dict = backbone.config, backbone.state_dict()
    encoder = TimmEncoder(**encoder_config | (options or {}))
    encoder.load_state_dict(state_dict)
    return encoder.eval().requires_grad_(False)


def _load_encoder_weights(config_path: Path) -> dict[str, Tensor]:
    """Load the weights of the encoder of a model from photos, in float32."""
    weights = load_file(config_path.with_name("model.safetensors"))
    prefix = "encoder."
    state_dict = {k[len(prefix) :]: v.float() for k, v in weights.items() if k.startswith(prefix)}
    if not state_dict:
        raise ModelLoadError(
            f"{str(config_path.parent)!r} holds no encoder of its own: name the model that its "
            "config.json takes it from (shared_weights)"
        )
    return state_dict


@torch.no_grad()
def predict_in_batches(
    classifier: AttributeClassifier, images: Tensor, batch_size: int = 64
) -> AttributePrediction:
    """Classify many images without keeping activations.

    Args:
        classifier: The classifier.
        images: [n, 3, height, width] in [0, 1], on any device.
        batch_size: Images per forward pass.

    Returns:
        The outputs for all n images, on the device of the images.
    """
    predictions: list[AttributePrediction] = [classifier(part) for part in images.split(batch_size)]
    logits = {
        name: torch.cat([prediction.logits[name] for prediction in predictions]).to(images.device)
        for name in predictions[0].logits
    }
    geometry = torch.cat([prediction.geometry for prediction in predictions])
    identity = torch.cat([prediction.identity for prediction in predictions])
    return AttributePrediction(logits, geometry.to(images.device), identity.to(images.device))


class LatentResNet(nn.Module):
    """A small ResNet from scaled latents to a pooled feature.

    The last feature map is flattened instead of averaged: positions matter, because the parts of a
    portrait cover only few latents.

    Args:
        latent_size: Height and width of the latents.
        channels: Channels of the latents.
        base_channels: Channels of the first stage, doubled in the second.
    """

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
        """Compute features [n, width] of scaled latents [n, channels, size, size]."""
        return self.pool(self.body(latents.to(next(self.parameters()))))


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Add two convolutions to the input [n, width, h, w]."""
        h = x  # [n, width, h, w]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(F.silu(norm(h)))  # [n, width, h, w]
        return x + h


def make_backbone(
    backbone: str, image_size: int, options: dict[str, Any] | None
) -> TimmEncoder | LatentResNet:
    """Make a backbone by its name.

    Args:
        backbone: A timm id, or ``LATENT_BACKBONE``.
        image_size: Height and width of images in pixels, or of latents.
        options: Further arguments of ``timm.create_model``; for ``LATENT_BACKBONE`` those of
            ``LatentResNet``: ``channels``, ``base_channels``.

    Returns:
        The backbone.
    """
    if backbone == LATENT_BACKBONE:
        return LatentResNet(image_size, **(options or {}))
    return TimmEncoder(backbone, image_size, options=options)
