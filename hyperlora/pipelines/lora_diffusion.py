"""``LoraDiffusion``: photos in, LoRA weights out of noise, by a diffusion model over LoRAs (DiffLoRA, 2408.06740).

photos ─ encoder (and face pack) ─▶ mixture ─▶ denoiser: noise ─▶ latents ─▶ codec ─▶ LoraWeights
"""

import os
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor

from hyperlora.data.images import to_image
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.encoders.face_analysis import FaceAnalyzer
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidImageError, ModelLoadError
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.image_feature_mixer import MixedImageFeatures
from hyperlora.models.lora_dit import LoraDiT
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase, SamplingConfig
from hyperlora.pipelines.lora_codec import LoraCodec

FACE_EMBED_DIM: Final = 512
"""Numbers in a face embedding of the ArcFace kind."""
_FACE_PACK_DIR: Final = "face-pack"
"""The face pack's folder in a released model."""
_DETECTOR_STRIDE: Final = 32
"""Detectors take sides that are multiples of it."""


class LoraDiffusion(ImageToLoraBase):
    """What a photo shows conditions a denoiser of LoRA latents; the same photo gives another LoRA for every seed.

    ``face_analyzer`` is None for a mixture that does not listen to faces; otherwise photos are read at the ``resolution`` that
    the card tells if the encoder's own is less, as little of a face is left there, and the pack lies in the released
    model's folder. The card says ``steps`` and ``guidance`` of sampling.
    """

    is_generative: ClassVar[bool] = True

    def __init__(
        self,
        encoder: TimmEncoder,
        mixture: MixedImageFeatures,
        denoiser: LoraDiT,
        codec: LoraCodec,
        face_analyzer: FaceAnalyzer | None = None,
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.mixture, self.denoiser, self.codec = encoder, mixture, denoiser, codec
        self.face_analyzer = face_analyzer
        self.card = card or {}

    @property
    def layout(self) -> LoraLayout:
        return self.codec.layout

    @property
    def photo_size(self) -> int:
        return (
            resolve_photo_size(self.encoder, self.card)
            if self.face_analyzer
            else super().photo_size
        )

    @property
    def encoder_provenance(self) -> tuple[str, str]:
        encoder_name, encoder_license = super().encoder_provenance
        if self.face_analyzer is None:
            return encoder_name, encoder_license
        return (
            f"{encoder_name}, {Path(self.face_analyzer.pack).name}",
            f"{encoder_license}; faces: {self.face_analyzer.license}",
        )

    def to_config(self) -> dict[str, Any]:
        return {
            "encoder": self.encoder.config,
            "mixture": self.mixture.config,
            "denoiser": self.denoiser.config,
            "codec": self.codec.to_config(),
            "face": _FACE_PACK_DIR if self.face_analyzer else None,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: DiffusionBase | None
    ) -> Self:
        codec = LoraCodec.from_config(config["codec"], layout, folder, base)
        mixture = MixedImageFeatures(**config["mixture"])
        denoiser = LoraDiT(*codec.latent_shape, mixture.width, **config["denoiser"])
        encoder = TimmEncoder(**config["encoder"])
        face_analyzer = (
            make_face_analyzer(_find_face_pack(folder, config["face"]), encoder, config["card"])
            if config["face"]
            else None
        )
        return cls(encoder, mixture, denoiser, codec, face_analyzer)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        if self.face_analyzer is not None:
            self.face_analyzer.copy_models(save_directory / _FACE_PACK_DIR)

    @torch.no_grad()
    def encode_photos(
        self, photos: Tensor, allow_no_face: bool = False
    ) -> tuple[ImageFeatures, ImageFeatures]:
        """What the face pack and the encoder say about photos [batch, views, 3, h, w]. Raises ``InvalidImageError`` if a face is
        needed and there is none; with ``allow_no_face``, for training, the pack says nothing (zeros) of such a photo."""
        image_features = self.encoder(photos)
        if self.face_analyzer is None:
            return ImageFeatures(
                photos.new_zeros(*photos.shape[:2], 1, FACE_EMBED_DIM)
            ), image_features
        face_embeddings = [
            self._embed_face(photo, self.face_analyzer, allow_no_face)
            for photo in photos.flatten(0, 1)
        ]
        return ImageFeatures(
            torch.stack(face_embeddings).to(photos).unflatten(0, photos.shape[:2])[:, :, None]
        ), image_features

    def _embed_face(
        self, photo: Tensor, face_analyzer: FaceAnalyzer, allow_no_face: bool
    ) -> Tensor:
        """The embedding of the largest face of a photo [3, h, w]."""
        try:
            embedding = face_analyzer.get_face(to_image(photo)).embedding
        except InvalidImageError:
            if allow_no_face:
                return torch.zeros(FACE_EMBED_DIM)
            raise
        if embedding is None:
            raise ModelLoadError(
                f"the face pack {face_analyzer.pack!r} has no recogniser: add one (w600k_*.onnx)"
            )
        return torch.as_tensor(embedding)

    def get_image_features(self, features: tuple[ImageFeatures, ImageFeatures]) -> ImageFeatures:
        return features[1]

    @torch.no_grad()
    def generate_from_features(
        self, features: tuple[ImageFeatures, ImageFeatures], sampling: SamplingConfig | None = None
    ) -> LoraWeights:
        """One LoRA per subject (batch axis), from noise that depends on the seed alone, not on who else is made."""
        conditioning, sampling_config = self.mixture(*features), sampling or SamplingConfig()
        noise = torch.randn(
            self.codec.latent_shape, generator=torch.Generator().manual_seed(sampling_config.seed)
        ).to(conditioning.tokens)
        num_inference_steps = (
            sampling_config.num_inference_steps
            if sampling_config.num_inference_steps is not None
            else int(self.card.get("steps", 10))
        )
        guidance_scale = (
            sampling_config.guidance_scale
            if sampling_config.guidance_scale is not None
            else float(self.card.get("guidance", 1.0))
        )
        latents = self.denoiser.sample(
            conditioning,
            noise.expand(len(conditioning.tokens), -1, -1),
            num_inference_steps,
            guidance_scale,
        )
        return self.apply_strength(self.codec.decode(latents))


def resolve_photo_size(encoder: TimmEncoder, card: dict[str, Any]) -> int:
    """Pixels a side that both the encoder and a face pack can do with."""
    return max(encoder.image_size, int(card.get("resolution", 0)))


def make_face_analyzer(
    pack: str | os.PathLike[str], encoder: TimmEncoder, card: dict[str, Any]
) -> FaceAnalyzer:
    """The faces of a pack in photos as such a model reads them. Raises what ``FaceAnalyzer`` raises."""
    return FaceAnalyzer(
        pack, det_size=-(-resolve_photo_size(encoder, card) // _DETECTOR_STRIDE) * _DETECTOR_STRIDE
    )


def _find_face_pack(folder: Path, pack_name: str) -> str | os.PathLike[str]:
    """A pack in the model's folder, beside it, or of that name on this machine."""
    return next(
        (path for path in (folder / pack_name, folder.parent / pack_name) if path.is_dir()),
        pack_name,
    )
