"""``ImageToLoraBase``: what all models from photos to LoRAs have in common."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hyperlora.encoders.identity_embedder import IdentityEmbedder
from hyperlora.encoders.ood_detector import OodDetector
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.encoders.unet_encoder import UNetFeatureEncoder
from hyperlora.features import ImageFeatures
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.input_checks import check_photos
from hyperlora.pipelines.model_card import ModelCard
from hyperlora.pipelines.photo_model import PhotoModel, SubjectPhotos
from hyperlora.pipelines.pretrained_model import PretrainedModel

ImageEncoder = TimmEncoder | UNetFeatureEncoder
DEFAULT_TRIGGER_PHRASE = "sks person"
"""The trigger phrase of a model whose card has none."""


@dataclass(frozen=True)
class EncodedPhotos:
    """The features of the photos of each subject, the input of the networks.

    Attributes:
        image: The features of the image encoder, [batch, views, tokens, width].
        face: The face embeddings, [batch, views, 1, width]; None for a model without them.
    """

    image: ImageFeatures
    face: ImageFeatures | None = None


class ImageToLoraBase(PhotoModel[EncodedPhotos], PretrainedModel):
    """A model that generates a LoRA from one or several photos of a subject.

    Attributes:
        encoder: The image encoder.
        ood_detector: Detects photos unlike those of training; None if the model has no such file.
        identity_embedder: Embeds identities, for refinement; None if the model has no such file.
    """

    card: ModelCard
    encoder: ImageEncoder
    ood_detector: OodDetector | None = None
    identity_embedder: IdentityEmbedder | None = None

    @property
    def trigger_phrase(self) -> str:
        """The words for the subject in a prompt."""
        return self.card.trigger_phrase or DEFAULT_TRIGGER_PHRASE

    @property
    def photo_size(self) -> int:
        """Pixels per side of the photos that ``encode_photos`` takes."""
        return self.encoder.image_size

    @property
    def encoder_provenance(self) -> tuple[str, str]:
        """The name and the license of the image encoder, for file metadata."""
        return str(self.encoder.config["name"]), self.encoder.license

    def encode_subjects(self, subjects: Sequence[SubjectPhotos]) -> EncodedPhotos:
        """Encode the photos of several subjects.

        Args:
            subjects: Subjects with equally many photos each.

        Returns:
            The input of ``generate_from_features``.
        """
        pixels = [photos.encoder_pixels for photos in subjects if photos.encoder_pixels is not None]
        return self.encode_photos(torch.stack(pixels))  # of [batch, views, 3, size, size]

    def list_warnings(self, features: EncodedPhotos) -> list[tuple[str, ...]]:
        """List for each subject what may be wrong with its photos."""
        return check_photos(self.ood_detector, features.image)

    def compute_fingerprint(self) -> str:
        """Compute the SHA-256 of the weights."""
        hasher = hashlib.sha256()
        for tensor in self.state_dict().values():
            hasher.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return hasher.hexdigest()

    def forward(self, photos: Tensor, sampling: LoraSampling | None = None) -> LoraWeights:
        """Generate the LoRAs of several subjects from pixels.

        Args:
            photos: [batch, views, 3, size, size] in [0, 1], on any device.
            sampling: Seed and steps of a model that ``is_generative``.

        Returns:
            One LoRA per subject (batch axis), on the device of the model.
        """
        return self.generate_from_features(self.encode_photos(photos), sampling)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        if self.ood_detector is not None:
            self.ood_detector.save(save_directory)
        if self.identity_embedder is not None:
            self.identity_embedder.save(save_directory)

    def load_sidecars(self, *folders: Path) -> None:
        """Read the detector of unknown photos and the identity embedder where there are any.

        Args:
            folders: The model's folder, then those of the models it shares weights with; the first
                folder that holds a file counts.

        Raises:
            ModelLoadError: A file is damaged or belongs to another encoder.
        """
        detectors = (OodDetector.load(folder, self.encoder) for folder in folders)
        self.ood_detector = next((detector for detector in detectors if detector is not None), None)
        embedders = (IdentityEmbedder.load(folder, self.encoder) for folder in folders)
        self.identity_embedder = next(
            (embedder for embedder in embedders if embedder is not None), None
        )

    @abstractmethod
    def encode_photos(self, photos: Tensor) -> EncodedPhotos:
        """Encode the photos of several subjects.

        Args:
            photos: [batch, views, 3, size, size] in [0, 1].

        Returns:
            The input of ``generate_from_features``.
        """

    @abstractmethod
    def generate_from_features(
        self, features: EncodedPhotos, sampling: LoraSampling | None = None
    ) -> LoraWeights:
        """Generate the LoRAs of several subjects from encoded photos.

        Args:
            features: What ``encode_photos`` returns.
            sampling: Seed and steps of a model that ``is_generative``; others ignore it.

        Returns:
            One LoRA per subject (batch axis).
        """
