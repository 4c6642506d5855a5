"""``LoraDiffusion``: a diffusion over LoRAs, guided by photos, after DiffLoRA (2408.06740).

photos ─ encoder (and face pack) ─▶ mixture ─▶ denoiser: noise ─▶ latents ─▶ codec ─▶ LoRA
                                 └▶ regression ─┘
"""

import os
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor

from hyperlora.data.images import to_image
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.encoders.face_analysis import FaceAnalyzer, round_det_size
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidImageError, ModelLoadError
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.image_feature_mixer import MixedImageFeatures
from hyperlora.models.latent_regression import LatentRegression
from hyperlora.models.lora_dit import LoraDiT
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.image_to_lora_base import EncodedPhotos, ImageToLoraBase
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.pipelines.model_card import ModelCard

FACE_EMBED_DIM: Final = 512
"""Width of a face embedding of the ArcFace kind."""
DEFAULT_NUM_INFERENCE_STEPS: Final = 10
"""Denoising steps over LoRA latents where the card names none."""
_FACE_PACK_DIR: Final = "face-pack"
"""The face pack's folder in a released model."""


class LoraDiffusion(ImageToLoraBase):
    """A diffusion model over LoRA latents, conditioned on photos: another LoRA for every seed.

    Args:
        encoder: The image encoder, frozen.
        mixture: Combines image and face features into the tokens that condition the denoiser.
        denoiser: Denoises LoRA latents [batch, tokens, width].
        codec: Decodes latents into LoRA weights.
        face_analyzer: Embeds faces; None for a mixture without face features.
        card: License, trigger phrase, sampling steps and guidance scale. ``card.resolution`` is
            the size of photos if there is a face analyzer and the encoder's own size is smaller.
        regression: Estimates the mean of the latents from the same features; None for no estimate.
    """

    method: ClassVar[str] = "lora-diffusion"
    is_generative: ClassVar[bool] = True
    encoder: TimmEncoder

    def __init__(
        self,
        encoder: TimmEncoder,
        mixture: MixedImageFeatures,
        denoiser: LoraDiT,
        codec: LoraCodec,
        face_analyzer: FaceAnalyzer | None = None,
        card: ModelCard | None = None,
        regression: LatentRegression | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.mixture, self.denoiser, self.codec = encoder, mixture, denoiser, codec
        self.regression = regression
        self.face_analyzer = face_analyzer
        self.card = card or ModelCard()

    @property
    def layout(self) -> LoraLayout:
        """The layout of the LoRAs."""
        return self.codec.layout

    @property
    def photo_size(self) -> int:
        """Pixels per side of the photos that ``encode_photos`` takes."""
        if self.face_analyzer is None:
            return super().photo_size
        return resolve_photo_size(self.encoder, self.card)

    @property
    def encoder_provenance(self) -> tuple[str, str]:
        """The names and the licenses of the image encoder and the face pack."""
        encoder_name, encoder_license = super().encoder_provenance
        if self.face_analyzer is None:
            return encoder_name, encoder_license
        return (
            f"{encoder_name}, {Path(self.face_analyzer.pack).name}",
            f"{encoder_license}; faces: {self.face_analyzer.license}",
        )

    def to_config(self) -> dict[str, Any]:
        """Return the arguments of all parts and the name of the face pack's folder."""
        return {
            "encoder": self.encoder.config,
            "mixture": self.mixture.config,
            "denoiser": self.denoiser.config,
            "codec": self.codec.to_config(),
            "regression": self.regression.config if self.regression else None,
            "face": _FACE_PACK_DIR if self.face_analyzer else None,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: DiffusionBase | None
    ) -> Self:
        """Build the network with random weights.

        Args:
            config: The content of ``config.json``.
            layout: The layout of the LoRAs.
            folder: The model's folder; the face pack lies in it or beside it.
            base: Not used.

        Returns:
            The network.

        Raises:
            ModelLoadError: There is no such face pack, or its library is not installed.
        """
        codec = LoraCodec.from_config(config["codec"], layout, folder, base)
        mixture = MixedImageFeatures(**config["mixture"])
        denoiser = LoraDiT(*codec.latent_shape, mixture.width, **config["denoiser"])
        encoder = TimmEncoder(**config["encoder"])
        regression = None
        if config.get("regression"):  # older models have no such entry
            regression = LatentRegression(*codec.latent_shape, **config["regression"])
        face_analyzer = None
        if config["face"]:
            pack = _find_face_pack(folder, config["face"])
            face_analyzer = make_face_analyzer(pack, encoder, ModelCard.from_dict(config["card"]))
        return cls(encoder, mixture, denoiser, codec, face_analyzer, regression=regression)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        if self.face_analyzer is not None:
            self.face_analyzer.copy_models(save_directory / _FACE_PACK_DIR)

    @torch.no_grad()
    def encode_photos(self, photos: Tensor, allow_no_face: bool = False) -> EncodedPhotos:
        """Encode the photos of several subjects, and the faces on them.

        Args:
            photos: [batch, views, 3, size, size] in [0, 1], on any device.
            allow_no_face: Whether a photo without a face gets an embedding of zeros, as in
                training, instead of an error.

        Returns:
            Image features [batch, views, tokens, width] and face embeddings [batch, views, 1, 512];
            the latter are zeros for a model without a face analyzer.

        Raises:
            InvalidImageError: A face is needed, and a photo shows none.
        """
        photos = photos.to(self.device)
        image_features = self.encoder(photos)  # [batch, views, tokens, width]
        if self.face_analyzer is None:
            face_embeddings = photos.new_zeros(*photos.shape[:2], FACE_EMBED_DIM)
        else:
            face_embeddings = torch.stack(
                [
                    self._embed_face(photo, self.face_analyzer, allow_no_face)
                    for photo in photos.flatten(0, 1)  # [3, size, size]
                ]
            ).to(photos)  # [batch * views, 512]
            face_embeddings = face_embeddings.unflatten(0, photos.shape[:2])
        return EncodedPhotos(image_features, ImageFeatures(face_embeddings[:, :, None]))

    def _embed_face(
        self, photo: Tensor, face_analyzer: FaceAnalyzer, allow_no_face: bool
    ) -> Tensor:
        """Embed the largest face of a photo [3, size, size]: [512]."""
        try:
            embedding = face_analyzer.get_face(to_image(photo)).embedding
        except InvalidImageError:
            if allow_no_face:
                return torch.zeros(FACE_EMBED_DIM)
            raise
        if embedding is None:
            raise ModelLoadError(
                f"the face pack {face_analyzer.pack!r} has no face recognizer: "
                "add one (w600k_*.onnx)"
            )
        return torch.as_tensor(embedding)

    @torch.no_grad()
    def generate_from_features(
        self, features: EncodedPhotos, sampling: LoraSampling | None = None
    ) -> LoraWeights:
        """Sample the LoRAs of several subjects from noise.

        The noise depends on the seed alone, so a subject's LoRA does not depend on its batch.

        Args:
            features: What ``encode_photos`` returns.
            sampling: Seed, steps and guidance scale; the card's values for those that are None.

        Returns:
            One LoRA per subject (batch axis).
        """
        if features.face is None:
            raise ValueError("face embeddings expected: encode the photos with this model")
        sampling = sampling or LoraSampling()
        conditioning = self.mixture(features.face, features.image)
        mean = self.regression(features.face, features.image) if self.regression else None
        generator = torch.Generator().manual_seed(sampling.seed)
        noise = torch.randn(self.codec.latent_shape, generator=generator)  # [tokens, width]
        num_inference_steps = (
            sampling.num_inference_steps
            or self.card.num_inference_steps
            or DEFAULT_NUM_INFERENCE_STEPS
        )
        guidance_scale = (
            self.card.guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale
        )
        latents = self.denoiser.sample(
            conditioning,
            noise.to(conditioning.tokens).expand(len(conditioning.tokens), -1, -1),
            num_inference_steps,
            guidance_scale,
            mean,
        )  # [batch, tokens, width]
        return self.apply_strength(self.codec.decode(latents))


def resolve_photo_size(encoder: TimmEncoder, card: ModelCard) -> int:
    """Resolve the size of photos that both an encoder and a face pack can use.

    Args:
        encoder: The image encoder, which shrinks larger photos itself.
        card: ``resolution`` is the size that leaves enough of a face.

    Returns:
        Pixels per side.
    """
    return max(encoder.image_size, card.resolution or 0)


def make_face_analyzer(
    pack: str | os.PathLike[str], encoder: TimmEncoder, card: ModelCard
) -> FaceAnalyzer:
    """Load a face pack for photos of the size that a ``LoraDiffusion`` takes.

    Args:
        pack: The folder of the pack, or its name on this machine.
        encoder: The image encoder of the model.
        card: The card of the model, with the resolution.

    Returns:
        The face analyzer, its detector at a multiple of 32 pixels.

    Raises:
        ModelLoadError: There is no such pack.
        InvalidArgumentError: The library of the pack is not installed.
    """
    return FaceAnalyzer(pack, round_det_size(resolve_photo_size(encoder, card)))


def _find_face_pack(folder: Path, pack_name: str) -> str | os.PathLike[str]:
    """Find a pack in the model's folder or beside it; else return its name."""
    return next(
        (path for path in (folder / pack_name, folder.parent / pack_name) if path.is_dir()),
        pack_name,
    )
