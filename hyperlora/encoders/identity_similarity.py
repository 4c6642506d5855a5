"""``IdentitySimilarity``: how similar the identity in generated images is to that in photos."""

import os
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.errors import ModelLoadError


@dataclass(frozen=True)
class IdentitySimilarity:
    """The identity score of ``hyperlora evaluate``.

    It is the cosine of identities on a scale where 0 is the mean of photos of two subjects and 1
    the mean of two photos of one subject. The classifier takes no part in generating images.

    Attributes:
        classifier: The network that embeds identities.
        different_subject_mean: Mean cosine of real photos of two subjects.
        same_subject_mean: Mean cosine of two real photos of one subject.
    """

    classifier: AttributeClassifier
    different_subject_mean: float
    same_subject_mean: float

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Load the classifier in a folder, with its scale.

        Raises:
            ModelLoadError: The folder holds no classifier, or one without identity scale.
        """
        classifier = AttributeClassifier.from_pretrained(folder)
        if classifier.identity_scale is None:
            raise ModelLoadError(
                f"the attribute classifier in {folder} has no identity scale: "
                f"run `python -m data_builder calibrate-identity`"
            )
        return cls(classifier, *classifier.identity_scale)

    def to(self, device: torch.device | str) -> Self:
        """Move the classifier, in place as ``nn.Module.to`` does."""
        self.classifier.to(device)
        return self

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the classifier's images."""
        return self.classifier.encoder.image_size

    @torch.no_grad()
    def __call__(self, photos: Tensor, images: Tensor) -> Tensor:
        """Score images against the photos of one subject.

        Args:
            photos: [views, 3, height, width] in [0, 1], on any device.
            images: [n, 3, height, width] in [0, 1], on any device.

        Returns:
            [n]: 0 is a stranger, 1 another real photo of the subject.
        """
        photo_embeds = self.classifier(photos).identity  # [views, width]
        image_embeds = self.classifier(images).identity  # [n, width]
        cosines = (image_embeds @ photo_embeds.mT).mean(1)  # [n]
        return scale_identity_cosine(cosines, self.different_subject_mean, self.same_subject_mean)


def scale_identity_cosine(
    cosines: Tensor, different_subject_mean: float, same_subject_mean: float
) -> Tensor:
    """Scale cosines of identity embeddings to identity scores.

    Args:
        cosines: Mean cosines between images and photos of a subject, of any shape.
        different_subject_mean: Mean cosine of real photos of two subjects, which becomes 0.
        same_subject_mean: Mean cosine of two real photos of one subject, which becomes 1.

    Returns:
        (cosines - different) / (same - different), of the same shape.
    """
    return (cosines - different_subject_mean) / (same_subject_mean - different_subject_mean)
