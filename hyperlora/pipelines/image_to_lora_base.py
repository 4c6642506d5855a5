"""What all networks that make LoRAs from photos have in common, whatever they do with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hyperlora.data.images import ImageSource, read_image, to_tensor
from hyperlora.encoders.identity_embedder import IdentityEmbedder
from hyperlora.encoders.ood_detector import OodDetector
from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.pretrained_model import PretrainedModel


@dataclass(frozen=True)
class SamplingConfig:
    """What a model that makes LoRAs out of noise is told: the ``seed`` of the noise and, where not as its card says,
    the ``num_inference_steps`` and the ``guidance_scale``."""

    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None


class ImageToLoraBase(PretrainedModel):
    """``encoder`` looks at the photos. Where the model's folder holds them, ``ood_detector`` tells photos like those it was
    trained on from others, and ``identity_embedder`` says who is in a picture."""

    is_generative: ClassVar[bool] = False
    """Whether other seeds give other LoRAs of the same photos."""
    encoder: Any
    ood_detector: OodDetector | None = None
    identity_embedder: IdentityEmbedder | None = None

    @property
    def trigger_phrase(self) -> str:
        """What a prompt calls the subject."""
        return str(self.card.get("trigger_phrase", "sks person"))

    @property
    def photo_size(self) -> int:
        """Pixels a side that photos are read at: what all that looks at them needs."""
        return int(self.encoder.image_size)

    @property
    def encoder_provenance(self) -> tuple[str, str]:
        """The name and the licence of what looks at the photos, for the headers of files."""
        return str(self.encoder.config["name"]), str(self.encoder.licence)

    @torch.no_grad()
    def __call__(
        self, images: ImageSource | Sequence[ImageSource], strength: float = 1.0
    ) -> LoraWeights:
        """One LoRA (no batch axis) from one or several photos of the same subject.

        Raises ``InvalidImageError`` for a photo that cannot be read, ``InvalidArgumentError`` for none.
        """
        photos = (
            list(images)
            if isinstance(images, Sequence) and not isinstance(images, str | bytes)
            else [images]
        )
        weights = self.generate_batch([photos])[0]
        return weights * strength if strength != 1 else weights

    @torch.no_grad()
    def generate_batch(self, subjects: Sequence[Sequence[ImageSource]]) -> LoraWeights:
        """One LoRA per subject (batch axis), each from as many photos as the others."""
        if not subjects or not all(subjects) or len({len(photos) for photos in subjects}) > 1:
            raise InvalidArgumentError(
                "every subject needs at least one photo, and all of a batch equally many"
            )
        photo_size = self.photo_size
        photos = torch.stack(
            [
                torch.stack([to_tensor(read_image(photo), photo_size) for photo in subject_photos])
                for subject_photos in subjects
            ]
        )
        return self.forward(photos.to(self.device))

    def forward(self, photos: Tensor, sampling: SamplingConfig | None = None) -> LoraWeights:
        """photos [batch, views, 3, h, w] in [0, 1]."""
        return self.generate_from_features(self.encode_photos(photos), sampling)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        if self.ood_detector is not None:
            self.ood_detector.save(save_directory)
        if self.identity_embedder is not None:
            self.identity_embedder.save(save_directory)

    def load_sidecars(self, *folders: Path) -> None:
        detectors = (OodDetector.load(folder, self.encoder) for folder in folders)
        self.ood_detector = next((detector for detector in detectors if detector is not None), None)
        embedders = (IdentityEmbedder.load(folder, self.encoder) for folder in folders)
        self.identity_embedder = next(
            (embedder for embedder in embedders if embedder is not None), None
        )

    def encode_photos(self, photos: Tensor) -> Any:
        """What is seen in photos [batch, views, 3, h, w]."""
        raise NotImplementedError

    def get_image_features(self, features: Any) -> ImageFeatures:
        """Of what was seen, what ``encoder`` said: ``ood_detector`` knows photos by it."""
        image_features: ImageFeatures = features
        return image_features

    def generate_from_features(
        self, features: Any, sampling: SamplingConfig | None = None
    ) -> LoraWeights:
        """One LoRA per subject (batch axis) from what was seen; ``sampling`` is for those that ``is_generative``."""
        raise NotImplementedError
