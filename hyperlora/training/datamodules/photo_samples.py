"""Samples of subjects: which photos are references and targets, and what becomes of their pixels.

A ``SamplePlan`` is drawn first, a few integers; ``SampleMaker`` then reads and crops. So a plan
with the same seed gives the same sample in any process, and the order of a run can be repeated.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.aspect_buckets import ImageSize
from hyperlora.data.images import stack_images, to_tensor
from hyperlora.data.photos import Photo, SubjectPhotos
from hyperlora.training.augmentation import (
    AugmentationConfig,
    crop_face,
    crop_target,
    make_reference_view,
)
from hyperlora.training.datamodules.collate import SubjectSample
from hyperlora.training.datamodules.face_filter import FaceRecord
from hyperlora.training.datamodules.target_cache import TargetCache, make_photo_id

SINGLE_PHOTO_CROPS: Final = 4
"""Least number of crops from which the target of a subject with one photo is drawn."""
_VIEW_MARGIN: Final = 1.3
"""Room, relative to the crop of a face, from which views of it are cropped."""


@dataclass(frozen=True)
class SampleConfig:
    """How samples of one data set are made.

    Attributes:
        source: Name of the source, which is part of the ids of photos.
        encoder_size: Side of references in pixels.
        resolution: Side of square targets in pixels.
        num_views: References per subject.
        num_targets: Targets per subject.
        num_crops: Crops from which a target is drawn; the first is the largest in the middle.
        identifier: What is put before the class noun for the subject itself.
        class_noun: What a caption calls any such subject.
        template: Caption of photos that have none.
        augmentation: How views differ from their photos.
        identical_targets: Whether a subject with one photo has it as reference and target.
        face_margin: Margin of references cropped to faces; None for the middle of photos.
        face_detector: What found the faces that targets keep, as text; empty for nothing.
    """

    source: str
    encoder_size: int
    resolution: int
    num_views: int
    num_targets: int
    num_crops: int
    identifier: str
    class_noun: str
    template: str
    augmentation: AugmentationConfig
    identical_targets: bool = False
    face_margin: float | None = None
    face_detector: str = ""


@dataclass(frozen=True)
class SamplePlan:
    """Which photos of a subject are used, and how.

    Attributes:
        subject_index: Index of the subject.
        references: Indices among the photos and generated views of the subject.
        targets: Indices among its photos.
        crops: Number of the crop of each target.
        size: Width and height of targets in pixels.
        seed: Seed of the views of references; None for references as they are.
    """

    subject_index: int
    references: tuple[int, ...]
    targets: tuple[int, ...]
    crops: tuple[int, ...]
    size: ImageSize
    seed: int | None


def plan_sample(
    subject: SubjectPhotos,
    subject_index: int,
    config: SampleConfig,
    rng: np.random.Generator,
    get_size: Callable[[Photo], ImageSize] | None = None,
) -> SamplePlan:
    """Draw references and targets of a subject.

    Args:
        subject: The subject.
        subject_index: Its index.
        config: How many, and which crops.
        rng: Random generator.
        get_size: Returns the size of a photo's bucket; all targets of a sample have that of the
            first. None for squares.

    Returns:
        The plan. A target is never among the references, unless the subject has one photo and no
        generated views; then references are random views, unless ``identical_targets`` is set.
    """
    photos, num_generated = subject.photos, len(subject.generated_views)
    order = rng.permutation(len(photos)).tolist()
    if num_generated:
        references, targets = _split_with_views(order, len(photos), num_generated, config, rng)
    else:
        references, targets = split_references(order, config.num_views, config.num_targets)
    size = (config.resolution, config.resolution)
    if get_size is not None:
        size = get_size(photos[targets[0]])
        alike = [i for i in targets if get_size(photos[i]) == size]
        targets = (alike * len(targets))[: len(targets)]
    is_same_photo = bool(set(references) & set(targets))
    num_crops = count_crops(subject, config)
    has_views = config.augmentation.all_references or (
        is_same_photo and not config.identical_targets
    )
    return SamplePlan(
        subject_index,
        tuple(references),
        tuple(targets),
        tuple(int(k) for k in rng.integers(num_crops, size=len(targets))),
        size,
        int(rng.integers(2**62)) if has_views else None,
    )


def count_crops(subject: SubjectPhotos, config: SampleConfig) -> int:
    """Count the crops from which a target of a subject is drawn.

    Args:
        subject: The subject.
        config: Number of crops of subjects with several photos.

    Returns:
        At least 4 for a subject whose only photo is also its reference.
    """
    is_single = len(subject.references) == 1 and not config.identical_targets
    return max(config.num_crops, SINGLE_PHOTO_CROPS) if is_single else config.num_crops


def _split_with_views(
    order: Sequence[int],
    num_photos: int,
    num_generated: int,
    config: SampleConfig,
    rng: np.random.Generator,
) -> tuple[list[int], list[int]]:
    """Split photos and generated views: targets are photos, all others may be references."""
    num_targets = min(config.num_targets, max(1, num_photos - 1)) if num_photos > 1 else 1
    targets = list(order[:num_targets])
    pool = np.array([*order[num_targets:], *range(num_photos, num_photos + num_generated)])
    references = rng.permutation(pool).tolist()
    repeated = (references * config.num_views)[: config.num_views]
    return repeated, (targets * config.num_targets)[: config.num_targets]


@dataclass(frozen=True)
class SampleMaker:
    """Makes samples from plans.

    Attributes:
        config: Sizes, captions and views.
        faces: Faces by photo id, where they are known.
        cache: Latents and embeddings; None for images and captions.
    """

    config: SampleConfig
    faces: Mapping[str, FaceRecord] = field(default_factory=dict)
    cache: TargetCache | None = None

    def make(self, subject: SubjectPhotos, plan: SamplePlan) -> SubjectSample:
        """Make a sample.

        Args:
            subject: The subject of the plan.
            plan: The plan.

        Returns:
            References and targets.

        Raises:
            InvalidImageError: A photo cannot be read.
        """
        images: dict[int, Image.Image] = {}  # each photo is decoded once

        def read_image(index: int) -> Image.Image:
            if index not in images:
                images[index] = subject.references[index].read_image()
            return images[index]

        captions = [self.make_caption(subject.photos[i]) for i in plan.targets]
        sample: SubjectSample = {
            "photos": torch.stack(
                [
                    self._make_reference(subject.references[i], read_image(i), plan.seed, position)
                    for position, i in enumerate(plan.references)
                ]
            ),  # [num_views, 3, encoder_size, encoder_size]
            "captions": captions,
            "subject_id": plan.subject_index,
        }
        targets = list(zip(plan.targets, plan.crops, strict=True))
        if self.cache is None:
            sample["images"] = torch.stack(
                [
                    self.make_target(subject.photos[i], read_image(i), plan.size, k)
                    for i, k in targets
                ]
            )
            return sample
        settings = self.get_cache_settings(plan.size)
        sample["latents"] = torch.stack(
            [
                self.cache.read_latents(self.get_id(subject.photos[i]), settings, k)
                for i, k in targets
            ]
        )
        sample["conditions"] = [self.cache.read_conditions(caption) for caption in captions]
        return sample

    def make_caption(self, photo: Photo) -> str:
        """Make the caption of a target."""
        config = self.config
        return personalize_caption(
            photo.caption, config.identifier, config.class_noun, config.template
        )

    def make_target(
        self, photo: Photo, image: Image.Image, size: ImageSize, crop_number: int
    ) -> Tensor:
        """Make one crop of a target.

        Args:
            photo: The photo.
            image: Its pixels.
            size: Width and height in pixels.
            crop_number: Number of the crop.

        Returns:
            [3, height, width] in [0, 1].
        """
        face = self.faces.get(self.get_id(photo))
        target = crop_target(
            image,
            size,
            crop_number,
            photo.key,
            self.config.augmentation.min_crop_scale,
            face.box if face else None,
        )
        return stack_images([target])[0]

    def get_id(self, photo: Photo) -> str:
        """Return the id of a photo in caches."""
        return make_photo_id(self.config.source, photo)

    def get_cache_settings(self, size: ImageSize) -> str:
        """Return a folder name for latents of a size: size, crops, and what found the faces."""
        scale, detector = self.config.augmentation.min_crop_scale, self.config.face_detector
        name = f"{size[0]}x{size[1]}-crop{scale:g}"
        return f"{name}-faces-{sha256(detector.encode()).hexdigest()[:8]}" if detector else name

    def _make_reference(
        self, photo: Photo, image: Image.Image, seed: int | None, position: int
    ) -> Tensor:
        """Make a reference [3, encoder_size, encoder_size]: a random view if there is a seed."""
        config, size = self.config, self.config.encoder_size
        face = self.faces.get(self.get_id(photo))
        if seed is None:
            if config.face_margin is not None and face is not None and face.crop is not None:
                x, y, side, angle = face.crop
                image = crop_face(image, (x, y), side, angle, size)
            return to_tensor(image, size)
        rng = np.random.default_rng([seed, position])
        box = face.box if face else None
        if config.face_margin is not None and face is not None and face.crop is not None:
            x, y, side, angle = face.crop
            side *= _VIEW_MARGIN
            image = crop_face(image, (x, y), side, angle, round(side))
            half = side / _VIEW_MARGIN / config.face_margin / 2  # of the aligned face
            box = (side / 2 - half, side / 2 - half, side / 2 + half, side / 2 + half)
        view = make_reference_view(image, size, rng, config.augmentation, box)
        return stack_images([view])[0]


def split_references(
    photos: Sequence[int], num_views: int, num_targets: int
) -> tuple[list[int], list[int]]:
    """Split the photos of one subject into references and targets.

    The first photos are references, but at least one photo is left for the targets. Where there
    are too few, they are repeated in turn. A single photo is both.

    Args:
        photos: Indices of the subject's photos, at least one.
        num_views: Number of references.
        num_targets: Number of targets.

    Returns:
        References and targets.
    """
    references = list(photos[: min(num_views, max(1, len(photos) - 1))])
    targets = list(photos[len(references) :]) or references
    return (references * num_views)[:num_views], (targets * num_targets)[:num_targets]


def personalize_caption(
    caption: str | None, identifier: str, class_noun: str, template: str
) -> str:
    """Turn the caption of a photo into a caption of this very subject.

    Args:
        caption: The photo's own caption; None if it has none.
        identifier: What is put before the class noun. A caption that has it already stays, and
            both replace ``{}``.
        class_noun: Its first occurrence, with its article, becomes "identifier noun".
        template: Used without a caption, and put before one that lacks the class noun.

    Returns:
        The caption.
    """
    subject_name = f"{identifier} {class_noun}"
    if caption is None:
        return template
    if "{}" in caption:  # of data-builder
        return caption.replace("{}", subject_name)
    if re.search(rf"\b{re.escape(identifier)}\b", caption):
        return caption
    noun_pattern = rf"\b(?:(?:an?|the)\s+)?{re.escape(class_noun)}\b"
    new_caption, num_replacements = re.subn(
        noun_pattern, lambda _: subject_name, caption, count=1, flags=re.IGNORECASE
    )
    return new_caption if num_replacements else f"{template}, {caption}"
