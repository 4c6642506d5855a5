"""What all networks that make LoRAs from photos have in common, whatever they do with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hyperlora.data.images import Source, read_image, to_tensor
from hyperlora.encoders.identity_embedder import Identity
from hyperlora.encoders.ood_detector import Domain
from hyperlora.errors import BadRequest
from hyperlora.features import ImageFeatures
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.pretrained_model import ReleasedModel


@dataclass(frozen=True)
class Sampling:
    """What a model that makes LoRAs out of noise is told: the ``seed`` of the noise and, where not as its card says,
    the ``steps`` and the ``guidance``."""

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None


class PhotoModel(ReleasedModel):
    """``encoder`` looks at the photos. Where the model's folder holds them, ``domain`` tells photos like those it was
    trained on from others, and ``identity`` says who is in a picture."""

    samples: ClassVar[bool] = False
    """Whether other seeds give other LoRAs of the same photos."""
    encoder: Any
    domain: Domain | None = None
    identity: Identity | None = None

    @property
    def trigger(self) -> str:
        """What a prompt calls the subject."""
        return str(self.card.get("trigger_phrase", "sks person"))

    @property
    def photo_size(self) -> int:
        """Pixels a side that photos are read at: what all that looks at them needs."""
        return int(self.encoder.image_size)

    @property
    def seen_through(self) -> tuple[str, str]:
        """The name and the licence of what looks at the photos, for the headers of files."""
        return str(self.encoder.config["name"]), str(self.encoder.licence)

    @torch.no_grad()
    def __call__(self, images: Source | Sequence[Source], strength: float = 1.0) -> LoraWeights:
        """One LoRA (no batch axis) from one or several photos of the same subject.

        Raises ``BadImage`` for a photo that cannot be read, ``BadRequest`` for none.
        """
        photos = list(images) if isinstance(images, Sequence) and not isinstance(images, str | bytes) else [images]
        weights = self.batch([photos])[0]
        return weights * strength if strength != 1 else weights

    @torch.no_grad()
    def batch(self, subjects: Sequence[Sequence[Source]]) -> LoraWeights:
        """One LoRA per subject (batch axis), each from as many photos as the others."""
        if not subjects or not all(subjects) or len({len(photos) for photos in subjects}) > 1:
            raise BadRequest("every subject needs at least one photo, and all of a batch equally many")
        size = self.photo_size
        photos = torch.stack([torch.stack([to_tensor(read_image(p), size) for p in s]) for s in subjects])
        return self.forward(photos.to(self.device))

    def forward(self, photos: Tensor, sampling: Sampling | None = None) -> LoraWeights:
        """photos [batch, views, 3, h, w] in [0, 1]."""
        return self.made(self.features(photos), sampling)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        if self.domain is not None:
            self.domain.save(save_directory)
        if self.identity is not None:
            self.identity.save(save_directory)

    def opened(self, *folders: Path) -> None:
        domains = (Domain.load(folder, self.encoder) for folder in folders)
        self.domain = next((domain for domain in domains if domain is not None), None)
        identities = (Identity.load(folder, self.encoder) for folder in folders)
        self.identity = next((identity for identity in identities if identity is not None), None)

    def features(self, photos: Tensor) -> Any:
        """What is seen in photos [batch, views, 3, h, w]."""
        raise NotImplementedError

    def image_features(self, features: Any) -> ImageFeatures:
        """Of what was seen, what ``encoder`` said: ``domain`` knows photos by it."""
        found: ImageFeatures = features
        return found

    def made(self, features: Any, sampling: Sampling | None = None) -> LoraWeights:
        """One LoRA per subject (batch axis) from what was seen; ``sampling`` is for those that ``samples``."""
        raise NotImplementedError
