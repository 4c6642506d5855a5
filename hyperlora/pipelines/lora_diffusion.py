"""``LoraDiffusion``: photos in, LoRA weights out of noise, by a diffusion model over LoRAs (DiffLoRA, 2408.06740).

photos ─ encoder (and face pack) ─▶ mixture ─▶ denoiser: noise ─▶ latents ─▶ codec ─▶ LoraWeights
"""

import os
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor

from hyperlora.data.images import to_image
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.encoders.face_analysis import FaceFinder
from hyperlora.encoders.timm_encoder import VisionEncoder
from hyperlora.errors import BadArtifact, BadImage
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.image_feature_mixer import MixtureOfFeatures
from hyperlora.models.lora_dit import LoraDenoiser
from hyperlora.pipelines.image_to_lora_base import PhotoModel, Sampling
from hyperlora.pipelines.lora_codec import LoraCodec

FACE_WIDTH: Final = 512
"""Numbers in a face embedding of the ArcFace kind."""
_FACES: Final = "face-pack"
"""The face pack's folder in a released model."""
_STRIDE: Final = 32
"""Detectors take sides that are multiples of it."""


class LoraDiffusion(PhotoModel):
    """What a photo shows conditions a denoiser of LoRA latents; the same photo gives another LoRA for every seed.

    ``face`` is None for a mixture that does not listen to faces; otherwise photos are read at the ``resolution`` that
    the card tells if the encoder's own is less, as little of a face is left there, and the pack lies in the released
    model's folder. The card says ``steps`` and ``guidance`` of sampling.
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

    @property
    def photo_size(self) -> int:
        return photo_size(self.encoder, self.card) if self.face else super().photo_size

    @property
    def seen_through(self) -> tuple[str, str]:
        name, licence = super().seen_through
        if self.face is None:
            return name, licence
        return f"{name}, {Path(self.face.pack).name}", f"{licence}; faces: {self.face.licence}"

    def parts(self) -> dict[str, Any]:
        return {
            "encoder": self.encoder.config, "mixture": self.mixture.config, "denoiser": self.denoiser.config,
            "codec": self.codec.parts(), "face": _FACES if self.face else None,
        }  # fmt: skip

    @classmethod
    def built(cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: Base | None) -> Self:
        codec = LoraCodec.built(config["codec"], layout, folder, base)
        mixture = MixtureOfFeatures(**config["mixture"])
        denoiser = LoraDenoiser(*codec.shape, mixture.width, **config["denoiser"])
        encoder = VisionEncoder(**config["encoder"])
        face = face_finder(_pack(folder, config["face"]), encoder, config["card"]) if config["face"] else None
        return cls(encoder, mixture, denoiser, codec, face)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        if self.face is not None:
            self.face.copy_to(save_directory / _FACES)

    @torch.no_grad()
    def features(self, photos: Tensor, faceless: bool = False) -> tuple[ImageFeatures, ImageFeatures]:
        """What the face pack and the encoder say about photos [batch, views, 3, h, w]. Raises ``BadImage`` if a face is
        needed and there is none; with ``faceless``, for training, the pack says nothing (zeros) of such a photo."""
        image = self.encoder(photos)
        if self.face is None:
            return ImageFeatures(photos.new_zeros(*photos.shape[:2], 1, FACE_WIDTH)), image
        seen = [self._face(photo, self.face, faceless) for photo in photos.flatten(0, 1)]
        return ImageFeatures(torch.stack(seen).to(photos).unflatten(0, photos.shape[:2])[:, :, None]), image

    def _face(self, photo: Tensor, finder: FaceFinder, faceless: bool) -> Tensor:
        """The embedding of the largest face of a photo [3, h, w]."""
        try:
            embedding = finder.face(to_image(photo)).embedding
        except BadImage:
            if faceless:
                return torch.zeros(FACE_WIDTH)
            raise
        if embedding is None:
            raise BadArtifact(f"the face pack {finder.pack!r} has no recogniser: add one (w600k_*.onnx)")
        return torch.as_tensor(embedding)

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


def photo_size(encoder: VisionEncoder, card: dict[str, Any]) -> int:
    """Pixels a side that both the encoder and a face pack can do with."""
    return max(encoder.image_size, int(card.get("resolution", 0)))


def face_finder(pack: str | os.PathLike[str], encoder: VisionEncoder, card: dict[str, Any]) -> FaceFinder:
    """The faces of a pack in photos as such a model reads them. Raises what ``FaceFinder`` raises."""
    return FaceFinder(pack, size=-(-photo_size(encoder, card) // _STRIDE) * _STRIDE)


def _pack(folder: Path, name: str) -> str | os.PathLike[str]:
    """A pack in the model's folder, beside it, or of that name on this machine."""
    return next((place for place in (folder / name, folder.parent / name) if place.is_dir()), name)
