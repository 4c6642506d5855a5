"""``LoraDiffusion``: photos in, LoRA weights out of noise, by a diffusion model over LoRAs (DiffLoRA, 2408.06740).

photos ─ encoder (and face pack) ─▶ mixture ─▶ denoiser: noise ─▶ latents ─▶ codec ─▶ LoraWeights
"""

import os
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor

from hyperlora.data import to_image
from hyperlora.encoders import VisionEncoder
from hyperlora.encoders.face import FaceFinder
from hyperlora.errors import BadArtifact
from hyperlora.features import ImageFeatures
from hyperlora.lora import LoraLayout, LoraWeights
from hyperlora.models import LoraDenoiser, MixtureOfFeatures
from hyperlora.pipelines.bases import Base
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.pipelines.photo_model import PhotoModel, Sampling

FACE_WIDTH: Final = 512
"""Numbers in a face embedding of the ArcFace kind."""


class LoraDiffusion(PhotoModel):
    """What a photo shows conditions a denoiser of LoRA latents; the same photo gives another LoRA for every seed.

    ``face`` is None for a mixture that does not listen to faces. The card says ``steps`` and ``guidance`` of sampling.
    """

    samples: ClassVar[bool] = True

    def __init__(
        self, encoder: VisionEncoder, mixture: MixtureOfFeatures, denoiser: LoraDenoiser, codec: LoraCodec,
        face: FaceFinder | None = None, card: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.mixture, self.denoiser, self.codec = encoder, mixture, denoiser, codec
        self.face = face
        self.card = card or {}

    @property
    def layout(self) -> LoraLayout:
        return self.codec.layout

    def parts(self) -> dict[str, Any]:
        return {
            "encoder": self.encoder.config, "mixture": self.mixture.config, "denoiser": self.denoiser.config,
            "codec": self.codec.parts(), "face": self.face.pack if self.face else None,
        }  # fmt: skip

    @classmethod
    def built(cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: Base | None) -> Self:
        codec = LoraCodec.built(config["codec"], layout, folder, base)
        mixture = MixtureOfFeatures(**config["mixture"])
        denoiser = LoraDenoiser(*codec.shape, mixture.width, **config["denoiser"])
        face = FaceFinder(_pack(folder, config["face"])) if config["face"] else None
        return cls(VisionEncoder(**config["encoder"]), mixture, denoiser, codec, face)

    @torch.no_grad()
    def features(self, photos: Tensor) -> tuple[ImageFeatures, ImageFeatures]:
        """What the face pack and the encoder say about photos [batch, views, 3, h, w]. Raises ``BadImage`` if a face is
        needed and there is none."""
        image = self.encoder(photos)
        if self.face is None:
            return ImageFeatures(photos.new_zeros(*photos.shape[:2], 1, FACE_WIDTH)), image
        found = [self.face.face(to_image(photo)).embedding for photo in photos.flatten(0, 1)]
        if any(embedding is None for embedding in found):
            raise BadArtifact(f"the face pack {self.face.pack!r} has no recogniser: add one (w600k_*.onnx)")
        embeddings = torch.stack([torch.as_tensor(e) for e in found]).to(photos)
        return ImageFeatures(embeddings.unflatten(0, photos.shape[:2])[:, :, None]), image

    def image_features(self, features: tuple[ImageFeatures, ImageFeatures]) -> ImageFeatures:
        return features[1]

    @torch.no_grad()
    def made(self, features: tuple[ImageFeatures, ImageFeatures], sampling: Sampling | None = None) -> LoraWeights:
        """One LoRA per subject (batch axis), from noise that depends on the seed alone, not on who else is made."""
        told, how = self.mixture(*features), sampling or Sampling()
        noise = torch.randn(self.codec.shape, generator=torch.Generator().manual_seed(how.seed)).to(told.tokens)
        steps = how.steps if how.steps is not None else int(self.card.get("steps", 10))
        guidance = how.guidance if how.guidance is not None else float(self.card.get("guidance", 1.0))
        latents = self.denoiser.sample(told, noise.expand(len(told.tokens), -1, -1), steps, guidance)
        return self.strong(self.codec.decode(latents))


def _pack(folder: Path, name: str) -> str | os.PathLike[str]:
    """A pack beside the model, or of that name on this machine."""
    return folder / name if (folder / name).is_dir() else name
