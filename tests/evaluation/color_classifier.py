"""A classifier that sees the mean color of an image alone, so that its outputs can be computed."""

from typing import Any

import torch
from torch import Tensor, nn

from hyperlora.encoders.attribute_classifier import LATENT_BACKBONE, AttributeClassifier

COLORS = {
    "hue": ["red", "green", "blue"],
    "tone": ["dark", "bright"],
    "warmth": ["cold", "warm"],
}
"""``hue`` is the channel with the largest mean, ``bright`` a mean above 0.5, ``warm`` more red than
blue."""


class MeanColor(nn.Module):
    """An encoder whose feature is the mean color."""

    image_size = 2

    def compute_pooled_features(self, images: Tensor) -> Tensor:
        """Compute the mean [n, 3] of images [n, 3, h, w]."""
        return images.mean((2, 3))


def make_color_classifier(identity_scale: tuple[float, float] | None = None) -> Any:
    """Make a classifier of ``COLORS``, whose identity is the mean color divided by its length."""
    sizes = {"channels": 3, "base_channels": 1}
    classifier = AttributeClassifier(
        LATENT_BACKBONE, 4, COLORS, identity_width=3, options=sizes, identity_scale=identity_scale
    )
    classifier.encoder = MeanColor()  # type: ignore[assignment]
    classifier.heads = nn.ModuleDict({k: nn.Linear(3, len(v)) for k, v in COLORS.items()})
    classifier.identity_head = nn.Linear(3, 3)
    weights = {
        "heads.hue.weight": torch.eye(3),
        "heads.tone.weight": torch.tensor([[-1.0], [1.0]]).expand(2, 3) / 3,
        "heads.tone.bias": torch.tensor([0.5, -0.5]),
        "heads.warmth.weight": torch.tensor([[-1.0, 0, 1], [1, 0, -1]]),
        "identity_head.weight": torch.eye(3),
    }
    for name, parameter in classifier.named_parameters():
        if not name.startswith(("encoder", "geometry")):
            parameter.data = weights.get(name, torch.zeros_like(parameter)).clone()
    classifier.geometry_head = nn.Linear(3, 1)
    return classifier


def paint(*colors: tuple[float, float, float], size: int = 2) -> Tensor:
    """Paint one image [3, size, size] per color."""
    return torch.tensor(colors)[..., None, None].expand(-1, -1, size, size)
