"""``ImageToLoraBase``: what all models from photos to LoRAs have in common."""

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from hyperlora.data.images import ImageSource, read_image, to_tensor
from hyperlora.encoders.identity_embedder import IdentityEmbedder
from hyperlora.encoders.ood_detector import OodDetector
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.encoders.unet_encoder import UNetFeatureEncoder
from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.io.lora import Lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.config import LoraSampling
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


class ImageToLoraBase(PretrainedModel):
    """A model that generates a LoRA from one or several photos of a subject.

    Attributes:
        is_generative: Whether other seeds give other LoRAs of the same photos.
        encoder: The image encoder.
        ood_detector: Detects photos unlike those of training; None if the model has no such file.
        identity_embedder: Embeds identities, for refinement; None if the model has no such file.
    """

    is_generative: ClassVar[bool] = False
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

    @torch.no_grad()
    def __call__(self, images: ImageSource | Sequence[ImageSource], strength: float = 1.0) -> Lora:
        """Generate a LoRA from one or several photos of the same subject.

        Args:
            images: A photo or several: paths, file bytes or PIL images of any size.
            strength: A factor of the LoRA.

        Returns:
            The LoRA with complete file metadata; its title is the name of the first file.

        Raises:
            InvalidImageError: A photo cannot be read.
            InvalidArgumentError: There is no photo.
        """
        photos = (
            list(images)
            if isinstance(images, Sequence) and not isinstance(images, str | bytes)
            else [images]
        )
        weights = self.generate_batch([photos])[0]
        lora = Lora(weights, self.make_metadata(_make_title(photos), photos))
        return lora * strength if strength != 1 else lora

    @torch.no_grad()
    def generate_batch(self, subjects: Sequence[Sequence[ImageSource]]) -> LoraWeights:
        """Generate the LoRAs of several subjects in one forward pass.

        Args:
            subjects: The photos of each subject, equally many for all.

        Returns:
            One LoRA per subject (batch axis).

        Raises:
            InvalidImageError: A photo cannot be read.
            InvalidArgumentError: A subject has no photo, or another number than the first.
        """
        if not subjects or not all(subjects) or len({len(photos) for photos in subjects}) > 1:
            raise InvalidArgumentError(
                "every subject needs at least one photo, and all of a batch equally many"
            )
        pixels = [
            torch.stack([to_tensor(read_image(photo), self.photo_size) for photo in photos])
            for photos in subjects
        ]
        return self.forward(torch.stack(pixels))

    def forward(self, photos: Tensor, sampling: LoraSampling | None = None) -> LoraWeights:
        """Generate the LoRAs of several subjects from pixels.

        Args:
            photos: [batch, views, 3, size, size] in [0, 1], on any device.
            sampling: Seed and steps of a model that ``is_generative``.

        Returns:
            One LoRA per subject (batch axis), on the device of the model.
        """
        return self.generate_from_features(self.encode_photos(photos), sampling)

    def make_metadata(
        self, title: str, images: Sequence[ImageSource], **extra: str
    ) -> LoraMetadata:
        """Make the file metadata of a LoRA of this model.

        Args:
            title: The name of the LoRA.
            images: The photos that it is generated from; PIL images are not recorded.
            **extra: Further keys of the file, e.g. ``hyperlora.consent``.

        Returns:
            Title, trigger phrase, licenses, architecture, resolution and SHA-256 of the photos.

        Raises:
            InvalidImageError: A path of ``images`` cannot be read.
        """
        metadata = self.card.make_metadata(title, images, self.encoder_provenance, extra)
        return replace(metadata, trigger_phrase=self.trigger_phrase)

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


def _make_title(images: Sequence[ImageSource]) -> str:
    """Return the name of the first file without its suffix; empty for bytes and PIL images."""
    first = images[0]
    return Path(first).stem if isinstance(first, str | os.PathLike) else ""
