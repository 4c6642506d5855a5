"""``PhotoModel``: what commands, service and nodes call on any model from photos to LoRAs.

Own models (``ImageToLoraBase``) and released ones (``pipelines/released``) fulfil it alike.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.images import ImageSource, read_image, to_tensor
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.encoders.identity_embedder import IdentityEmbedder
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.lora import Lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.model_card import ModelCard

if TYPE_CHECKING:
    from hyperlora.finetuning.config import RefineConfig

FeaturesT = TypeVar("FeaturesT")
"""What a model computes from the photos of several subjects, the input of its network."""


@dataclass(frozen=True)
class SubjectPhotos:
    """The photos of one subject, decoded once.

    Attributes:
        encoder_pixels: [views, 3, size, size] in [0, 1], of the model's ``photo_size``; None for a
            model that crops photos itself.
        base_pixels: [views, 3, resolution, resolution] in [0, 1], of the base's resolution; None
            if the base does not run, or can use no photo.
        images: The photos as they are, for a model that crops them itself; else empty.
    """

    encoder_pixels: Tensor | None = None
    base_pixels: Tensor | None = None
    images: tuple[Image.Image, ...] = ()

    @classmethod
    def from_images(
        cls,
        images: Sequence[Image.Image],
        model: "AnyPhotoModel",
        base: DiffusionBase | None = None,
    ) -> "SubjectPhotos":
        """Convert the photos of a subject to what a model and its base need.

        Args:
            images: RGB images of any size.
            model: The model that encodes them.
            base: The base that refines or reranks LoRAs of them, if any.

        Returns:
            Pixels or images for the model, and pixels for the base.
        """
        size = model.photo_size
        base_images = [] if base is None else model.crop_for_base(images)
        return cls(
            None if size is None else _stack_squares(images, size),
            _stack_squares(base_images, base.resolution) if base and base_images else None,
            tuple(images) if size is None else (),
        )

    @classmethod
    def cat(cls, parts: Sequence["SubjectPhotos"]) -> "SubjectPhotos":
        """Concatenate photos of one subject that were decoded separately."""
        encoder_pixels = [part.encoder_pixels for part in parts if part.encoder_pixels is not None]
        base_pixels = [part.base_pixels for part in parts if part.base_pixels is not None]
        return cls(
            torch.cat(encoder_pixels) if encoder_pixels else None,
            torch.cat(base_pixels) if base_pixels else None,
            tuple(image for part in parts for image in part.images),
        )


class PhotoModel(ABC, Generic[FeaturesT]):
    """A model that generates a LoRA from one or several photos of a subject.

    Attributes:
        method: The name of the method, as ``--method`` names it.
        is_generative: Whether other seeds give other LoRAs of the same photos.
        file_dtype: The precision of the files of its LoRAs.
        runs_in_own_process: Whether it computes in another process, so that its callers wait.
        card: License, trigger phrase and recommended settings.
        identity_embedder: Embeds identities, for refinement; None for a model without one.
    """

    method: ClassVar[str]
    is_generative: ClassVar[bool] = False
    file_dtype: ClassVar[torch.dtype] = torch.float32
    runs_in_own_process: ClassVar[bool] = False
    card: ModelCard
    identity_embedder: IdentityEmbedder | None = None

    @property
    @abstractmethod
    def layout(self) -> LoraLayout:
        """The layout of the LoRA of one photo."""

    @property
    def trigger_phrase(self) -> str:
        """The words for the subject in a prompt."""
        return self.card.trigger_phrase

    @property
    def refine_config(self) -> "RefineConfig | None":
        """Settings with which its LoRAs are refined; None for those of ``RefineConfig``."""
        return None

    @property
    def refine_prompt(self) -> str:
        """The prompt of the photos while a LoRA is refined."""
        return f"a portrait of {self.trigger_phrase}"

    def crop_for_base(self, images: Sequence[Image.Image]) -> Sequence[Image.Image]:
        """Cut photos to what the base sees of them while a LoRA is refined.

        Args:
            images: RGB images of any size.

        Returns:
            The images whose center squares the base sees, without those that it cannot use.
        """
        return images

    @property
    def photo_size(self) -> int | None:
        """Pixels per side of ``SubjectPhotos.encoder_pixels``; None for ``images`` instead."""
        return None

    @abstractmethod
    def encode_subjects(self, subjects: Sequence[SubjectPhotos]) -> FeaturesT:
        """Encode the photos of several subjects.

        Args:
            subjects: Subjects with equally many photos each.

        Returns:
            The input of ``generate_from_features``.

        Raises:
            InvalidImageError: The model finds nothing that it knows, e.g. no face.
        """

    @abstractmethod
    def generate_from_features(
        self, features: FeaturesT, sampling: LoraSampling | None = None
    ) -> LoraWeights:
        """Generate the LoRAs of several subjects from encoded photos.

        Args:
            features: What ``encode_subjects`` returns.
            sampling: Seed and steps of a model that ``is_generative``; others ignore it.

        Returns:
            One LoRA per subject (batch axis), of the targets of ``layout`` at any rank.
        """

    def generate_negative(self, features: FeaturesT) -> LoraWeights | None:
        """Generate the LoRAs of the negative branch of guidance, for a model that has such.

        Args:
            features: What ``encode_subjects`` returns.

        Returns:
            One LoRA per subject (batch axis); None if the negative branch has the same or none.
        """
        return None

    @abstractmethod
    def list_warnings(self, features: FeaturesT) -> list[tuple[str, ...]]:
        """List what may be wrong with the photos.

        Args:
            features: What ``encode_subjects`` returns.

        Returns:
            For each subject one sentence per doubt.
        """

    @property
    @abstractmethod
    def encoder_provenance(self) -> tuple[str, str]:
        """The names and the licenses of what encodes the photos, for file metadata."""

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

    @abstractmethod
    def compute_fingerprint(self) -> str:
        """Compute text that changes with the weights, so that a folder's index can trust it."""

    def check_base(self, base: DiffusionBase) -> None:
        """Check that the LoRAs fit a base.

        Args:
            base: The base that refines LoRAs or draws with them.

        Raises:
            LayoutMismatchError: They are for another base.
        """
        self.layout.check_base(base.id)

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
        photos = [
            SubjectPhotos.from_images([read_image(source) for source in sources], self)
            for sources in subjects
        ]
        return self.generate_from_features(self.encode_subjects(photos))


AnyPhotoModel = PhotoModel[Any]
"""A model from photos, whatever it computes from them."""


def _stack_squares(images: Sequence[Image.Image], size: int) -> Tensor:
    """[n, 3, size, size] in [0, 1]: the center squares."""
    return torch.stack([to_tensor(image, size) for image in images])


def _make_title(images: Sequence[ImageSource]) -> str:
    """Return the name of the first file without its suffix; empty for bytes and PIL images."""
    first = images[0]
    return Path(first).stem if isinstance(first, str | os.PathLike) else ""
