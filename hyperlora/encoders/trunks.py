"""What a ``Reader`` looks through: a timm backbone for pictures, or a small residual network for latents."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.encoders.vision import VisionEncoder

LATENTS = "latents"
"""The backbone's name that stands for ``LatentTrunk``."""


class LatentTrunk(nn.Module):
    """Scaled latents [n, channels, size, size] of pictures to a pooled feature [n, 256]; places stay apart in it, as
    the parts of a portrait are few latents."""

    width = 256

    def __init__(self, size: int, channels: int, inner: int = 64) -> None:
        super().__init__()
        self.image_size = size
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 3, padding=1), _Residual(inner), _Residual(inner),
            nn.Conv2d(inner, 2 * inner, 3, stride=2, padding=1), _Residual(2 * inner), _Residual(2 * inner),
            nn.Conv2d(2 * inner, 2 * inner, 3, stride=2, padding=1), _Residual(2 * inner), nn.Conv2d(2 * inner, 48, 1),
        )  # fmt: skip
        side = (size + 3) // 4
        self.pool = nn.Sequential(nn.Flatten(), nn.Linear(48 * side * side, self.width), nn.GELU())

    def pooled(self, latents: Tensor) -> Tensor:
        """[n, width]."""
        return self.pool(self.body(latents))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(F.silu(norm(h)))
        return x + h


def trunk_of(backbone: str, image_size: int, options: dict[str, Any] | None) -> VisionEncoder | LatentTrunk:
    """The trunk of a name: ``latents`` (options ``channels``, ``inner``) or a timm id (options of it)."""
    if backbone == LATENTS:
        return LatentTrunk(image_size, **(options or {}))
    return VisionEncoder(backbone, image_size, options=options)
