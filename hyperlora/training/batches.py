"""Batches: what data modules pass to LightningModules, a frozen dataclass for each training.

Shapes are written with n for the batch size, h and w for a side in pixels (or latent pixels), and
c for channels. A field that a data module does not fill is None.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Self

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils.data import default_collate

from hyperlora.diffusion.conditions import Conditions

AttributeLabels = Mapping[str, Tensor]
"""Class indices [n] by attribute; ``IGNORE_INDEX`` where an attribute has no label."""


@dataclass(frozen=True)
class Batch:
    """Fields of tensors, texts and mappings of tensors that move to a device together.

    Lightning refuses to move a frozen dataclass field by field, but calls ``to`` where there is
    one. ``pin_memory`` is what ``DataLoader(pin_memory=True)`` calls.
    """

    def to(self, device: torch.device | str) -> Self:
        """Move all tensors to ``device``; texts stay."""
        return self._map_fields(partial(move_data_to_device, device=device))

    def pin_memory(self) -> Self:
        """Copy all tensors to page-locked memory."""
        return self._map_fields(Tensor.pin_memory)

    @classmethod
    def collate(cls, samples: Sequence[Mapping[str, object]]) -> Self:
        """Stack samples to a batch, for ``DataLoader(collate_fn=...)``.

        Args:
            samples: Mappings with the names of the fields: tensors without batch axis, integers,
                texts, and mappings of these.

        Returns:
            The batch: tensors [n, ...], integers as tensors [n], texts as lists of n.
        """
        return cls(**default_collate(list(samples)))

    def _map_fields(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: _map_tensors(getattr(self, f.name), function) for f in fields(self)}
        return type(self)(**values)


def _map_tensors(value: object, function: Callable[[Tensor], Tensor]) -> object:
    """Apply ``function`` to a tensor, or to the tensors of a mapping; return all else as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class ImageLatentBatch(Batch):
    """Images with their latents, for the decoder of an image autoencoder."""

    images: Tensor
    """[n, 3, h, w] in [-1, 1]."""
    latents: Tensor
    """Scaled latents [n, c, h / f, w / f]."""


@dataclass(frozen=True)
class CaptionedLatentBatch(Batch):
    """Latents with captions, for a text-to-image base."""

    latents: Tensor
    """Scaled latents [n, c, h, w]."""
    captions: list[str]
    """n captions; empty ones train the unconditional output of classifier-free guidance."""
    labels: AttributeLabels | None = None
    """Classes of the attributes that the caption names."""


@dataclass(frozen=True)
class AttributeBatch(Batch):
    """Images or latents with all attributes, for an attribute classifier."""

    images: Tensor
    """[n, 3, h, w] in [0, 1], or scaled latents [n, c, h, w]."""
    labels: AttributeLabels
    """Classes of all attributes that are visible."""
    geometry: Tensor
    """Standardized measures of the face [n, num_measures]."""
    subject_ids: Tensor
    """Which subject an image shows, [n] integers."""


@dataclass(frozen=True)
class FaceDetectionBatch(Batch):
    """Images with up to m faces each, for a face detector."""

    images: Tensor
    """[n, 3, h, w] in [0, 1]."""
    boxes: Tensor
    """Left, top, right, bottom of each face in pixels, [n, m, 4]."""
    keypoints: Tensor
    """Five keypoints (x, y) of each face in pixels, [n, m, 5, 2]."""
    face_kinds: Tensor
    """[n, m]: ``FACE``, ``AMBIGUOUS``, or 0 where there is no face."""


@dataclass(frozen=True)
class FaceRecognitionBatch(Batch):
    """Aligned faces of known identities, for a face recognizer."""

    faces: Tensor
    """[n, 3, 112, 112] in [0, 1]."""
    subject_ids: Tensor
    """[n]: in training the row of ``identity_vectors``, in validation any id of the subject."""
    identity_vectors: Tensor | None = None
    """Attributes of the identities of one softmax as numbers, [num_identities, vector_dim]."""


@dataclass(frozen=True)
class SubjectBatch(Batch):
    """Reference photos and target images of the same subjects, for a hypernetwork.

    With t targets for each of n subjects, target j of subject i has the index j * n + i, the
    order in which ``inject_lora`` distributes n LoRAs over t * n samples.
    """

    captions: list[str]
    """t * n captions of the targets."""
    subject_ids: Tensor
    """Which subject, [n] integers."""
    photos: Tensor | None = None
    """Reference photos [n, num_views, 3, h, w] in [0, 1], unless ``tokens`` are given."""
    tokens: Tensor | None = None
    """Features of the photos from the frozen encoder, [n, num_views, num_tokens, width]."""
    latents: Tensor | None = None
    """Scaled latents of the targets [t * n, c, h, w], unless ``images`` are given."""
    images: Tensor | None = None
    """Targets as images [t * n, 3, h, w] in [0, 1]."""
    labels: AttributeLabels | None = None
    """Classes of the attributes that a target shows, each [t * n]."""
    conditions: Conditions | None = None
    """Embeddings of the captions [t * n, ...]; None for a text encoder that encodes them."""
    progress: Mapping[str, object] | None = None
    """Where a stream goes on after this batch, in plain values."""


@dataclass(frozen=True)
class EditBatch(Batch):
    """Latents before and after an edit with its instruction, for an InstructPix2Pix base."""

    before: Tensor
    """Scaled latents [n, c, h, w]."""
    after: Tensor
    """Scaled latents [n, c, h, w]."""
    instructions: list[str]
    """n edit prompts; an empty one leaves the image unchanged."""
    labels: AttributeLabels | None = None
    """Classes of the attributes that the image after the edit shows."""


@dataclass(frozen=True)
class PairBatch(Batch):
    """Example pairs (A, A') and a target pair (B, B') of the same edit, for a pair hypernetwork."""

    instructions: list[str]
    """n edit prompts of the targets."""
    pairs: Tensor | None = None
    """Example pairs [n, num_views, 2, 3, h, w] in [0, 1], unless ``tokens`` are given."""
    tokens: Tensor | None = None
    """Features of the examples from the frozen encoder, [n, num_views, 2, num_tokens, width]."""
    before: Tensor | None = None
    """Scaled latents of B, [n, c, h, w]."""
    after: Tensor | None = None
    """Scaled latents of B', [n, c, h, w]."""
    images: Tensor | None = None
    """B and B' as images [n, 2, 3, h, w] in [0, 1], in place of ``before`` and ``after``."""
    undo_instructions: list[str] | None = None
    """n edit prompts of the way back, where they are known."""
    labels_before: AttributeLabels | None = None
    """Classes of the attributes that B shows."""
    labels_after: AttributeLabels | None = None
    """Classes of the attributes that B' shows."""

    @property
    def encoder_input(self) -> Tensor:
        """``tokens`` where they are given, otherwise ``pairs``: [n, num_views, 2, ...]."""
        encoder_input = self.pairs if self.tokens is None else self.tokens
        assert encoder_input is not None, "a PairBatch needs pairs or tokens"
        return encoder_input


@dataclass(frozen=True)
class LoraPhotoBatch(Batch):
    """Latents of LoRAs with features of photos of their subjects, for a diffusion over LoRAs."""

    latents: Tensor
    """Latents of the LoRAs [n, num_tokens, width]."""
    face_features: Tensor
    """Features of the face pack [n, num_views, 1, face_width]."""
    image_features: Tensor
    """Tokens of the image encoder [n, num_views, num_image_tokens, image_width]."""
