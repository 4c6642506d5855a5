"""``Reader``: names a portrait's attributes and places its subject in an identity space."""

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

from hyperlora.encoders.timm_encoder import VisionEncoder
from hyperlora.errors import BadArtifact, BadRequest


@dataclass(frozen=True)
class Reading:
    """``logits`` per attribute [n, classes]; ``geometry`` [n, measures]; ``identity`` [n, width] of unit length."""

    logits: Mapping[str, Tensor]
    geometry: Tensor
    identity: Tensor


class Reader(nn.Module):
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
        self.encoder = trunk_of(backbone, image_size, options)
        self.config = {
            "backbone": backbone,
            "image_size": image_size,
            "attributes": {k: list(v) for k, v in self.attributes.items()},
            "geometry": list(geometry),
            "identity_width": identity_width,
            "options": options or {},
        }
        width = self.encoder.width
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(c)) for name, c in self.attributes.items()})
        self.geometry_head = nn.Linear(width, max(1, len(self.geometry)))
        self.identity_head = nn.Linear(width, identity_width)

    def forward(self, images: Tensor) -> Reading:
        """images [n, 3, h, w] in [0, 1], or latents."""
        pooled = self.encoder.pooled(images)
        identity = F.normalize(self.identity_head(pooled), dim=-1)
        return Reading({k: head(pooled) for k, head in self.heads.items()}, self.geometry_head(pooled), identity)

    def names(self, reading: Reading) -> list[dict[str, str]]:
        """The most likely class of every attribute, one dictionary per image."""
        best = {k: v.argmax(-1).tolist() for k, v in reading.logits.items()}
        n = len(reading.identity)
        return [{k: self.attributes[k][best[k][i]] for k in best} for i in range(n)]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` (fp16)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        scale = {"identity_scale": self.identity_scale} if self.identity_scale else {}
        (folder / "config.json").write_text(json.dumps(self.config | scale, indent=1))
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> "Reader":
        """Read what ``save_pretrained`` wrote. Raises ``BadArtifact`` if the folder holds no reader."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise BadArtifact(f"{folder} holds no reader: config.json and model.safetensors expected")
        reader = cls(**json.loads((folder / "config.json").read_text()))
        reader.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        return reader.eval().requires_grad_(False)


def photo_encoder(name: str, options: dict[str, Any] | None = None) -> VisionEncoder:
    """What a released reader of pictures (a folder) looks through, or the timm backbone ``name``; ``options`` are
    ``VisionEncoder``'s (of a reader's, ``colours`` may be given).

    Raises ``BadRequest`` for a reader of latents.
    """
    if not (Path(name) / "config.json").is_file():
        return VisionEncoder(name, **(options or {}))
    trunk = Reader.from_pretrained(name).encoder
    if not isinstance(trunk, VisionEncoder):
        raise BadRequest(f"{name} reads latents, a reader of pictures was expected")
    seen = VisionEncoder(**(trunk.config | (options or {})))
    seen.load_state_dict(trunk.state_dict())
    return seen.eval().requires_grad_(False)


@torch.no_grad()
def read_in_batches(reader: Reader, images: Tensor, batch_size: int = 64) -> Reading:
    """``reader(images)`` on many images without keeping activations."""
    parts = [reader(batch) for batch in images.split(batch_size)]
    return Reading(
        {k: torch.cat([p.logits[k] for p in parts]) for k in parts[0].logits},
        torch.cat([p.geometry for p in parts]),
        torch.cat([p.identity for p in parts]),
    )


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
