"""``Likeness``: how much drawn portraits show the person of given photos."""

import os
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hyperlora.encoders.attribute_classifier import Reader
from hyperlora.errors import BadArtifact


@dataclass(frozen=True)
class Likeness:
    """The score I of ``hyperlora evaluate``, read by a network that took no part in drawing: the cosine of identities,
    on a scale where ``different`` is the mean of real photos of two people and ``same`` of one person."""

    reader: Reader
    different: float
    same: float

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """By the reader in ``folder``. Raises ``BadArtifact`` if there is none, or one whose scale is not measured."""
        reader = Reader.from_pretrained(folder)
        if reader.identity_scale is None:
            raise BadArtifact(f"the reader in {folder} has no identity scale: run `python -m data_builder likeness`")
        return cls(reader, *reader.identity_scale)

    @property
    def image_size(self) -> int:
        """Pixels of a side."""
        return self.reader.encoder.image_size

    @torch.no_grad()
    def __call__(self, photos: Tensor, pictures: Tensor) -> Tensor:
        """Of each of ``pictures`` [n, 3, h, w] to ``photos`` [views, 3, h, w], all in [0, 1]: 0 is anyone, 1 another
        real photo of the same person; [n]."""
        real, drawn = self.reader(photos).identity, self.reader(pictures).identity
        return ((drawn @ real.mT).mean(1) - self.different) / (self.same - self.different)
