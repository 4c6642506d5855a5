"""``IdentitySimilarity``: how much drawn portraits show the person of given photos."""

import os
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.errors import ModelLoadError


@dataclass(frozen=True)
class IdentitySimilarity:
    """The score I of ``main_callback evaluate``, read by a network that took no part in drawing: the cosine of identities,
    on a scale where ``different_subject_mean`` is the mean of real photos of two people and ``same_subject_mean`` of one person."""

    classifier: AttributeClassifier
    different_subject_mean: float
    same_subject_mean: float

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """By the reader in ``folder``. Raises ``ModelLoadError`` if there is none, or one whose scale is not measured."""
        classifier = AttributeClassifier.from_pretrained(folder)
        if classifier.identity_scale is None:
            raise ModelLoadError(
                f"the reader in {folder} has no identity scale: run `python -m data_builder likeness`"
            )
        return cls(classifier, *classifier.identity_scale)

    @property
    def image_size(self) -> int:
        """Pixels of a side."""
        return self.classifier.encoder.image_size

    @torch.no_grad()
    def __call__(self, photos: Tensor, images: Tensor) -> Tensor:
        """Of each of ``images`` [n, 3, h, w] to ``load_photos`` [views, 3, h, w], all in [0, 1]: 0 is anyone, 1 another
        real photo of the same person; [n]."""
        photo_embeddings, image_embeddings = (
            self.classifier(photos).identity,
            self.classifier(images).identity,
        )
        return ((image_embeddings @ photo_embeddings.mT).mean(1) - self.different_subject_mean) / (
            self.same_subject_mean - self.different_subject_mean
        )
