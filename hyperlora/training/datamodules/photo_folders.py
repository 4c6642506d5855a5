"""``PhotoFolderDataModule``: photos of subjects from folders, for a hypernetwork."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from hyperlora.data.images import read_image, to_tensor
from hyperlora.data.subjects import Subject, list_subjects
from hyperlora.training.datamodules.base import FolderDataModule
from hyperlora.training.datamodules.collate import SubjectSample, collate_subjects


class PhotoFolderDataModule(FolderDataModule):
    """Load reference photos and other photos of the same subjects, with captions.

    Of a subject with too few photos some come twice. A target is never one of the references,
    unless the subject has a single photo. Validation uses the same photos every time, with one
    target each. A subject's id is its index in the order of names.

    Args:
        folder: Folder with one folder of photos per training subject (see ``list_subjects``).
        validation: The same for validation subjects.
        resolution: Side of target images in pixels, the base's.
        encoder_size: Side of reference photos in pixels, the encoder's.
        batch_size: Subjects per device and step.
        num_views: Reference photos per subject.
        num_targets: Target photos per subject.
        class_noun: What a caption calls any such subject.
        identifier: What is put before the class noun for the subject itself: "a person in the
            rain" becomes "sks person in the rain".
        prompt_template: Caption of photos that have none, with ``{identifier} {class_noun}``.
        num_workers: Processes that load photos.

    Raises:
        InvalidImageError: A folder has no subjects, or a photo cannot be read.
        InvalidArgumentError: There are fewer training subjects than one step takes.
    """

    sample_noun = "subjects"
    collate_fn = staticmethod(collate_subjects)

    def __init__(
        self,
        folder: str,
        validation: str,
        resolution: int,
        encoder_size: int = 224,
        batch_size: int = 4,
        num_views: int = 4,
        num_targets: int = 1,
        class_noun: str = "person",
        identifier: str = "sks",
        prompt_template: str = "a photo of {identifier} {class_noun}",
        num_workers: int = 4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)

    def make_dataset(self, training: bool) -> "_PhotoDataset":
        """Make the dataset of training, or else of validation."""
        h = self.hparams
        template = h["prompt_template"].format(
            identifier=h["identifier"], class_noun=h["class_noun"]
        )
        return _PhotoDataset(
            list_subjects(h["folder"] if training else h["validation"]),
            _PhotoDatasetConfig(
                encoder_size=h["encoder_size"],
                resolution=h["resolution"],
                num_views=h["num_views"],
                num_targets=h["num_targets"] if training else 1,
                identifier=h["identifier"],
                class_noun=h["class_noun"],
                template=template,
                deterministic=not training,
            ),
        )


@dataclass(frozen=True)
class _PhotoDatasetConfig:
    """Settings of ``PhotoFolderDataModule`` for one of its datasets."""

    encoder_size: int
    resolution: int
    num_views: int
    num_targets: int
    identifier: str
    class_noun: str
    template: str
    """Caption of photos that have none."""
    deterministic: bool
    """Whether a subject's references and targets are the same every time."""


class _PhotoDataset(Dataset[SubjectSample]):
    """References and targets of one subject per sample."""

    def __init__(self, subjects: Sequence[Subject], config: _PhotoDatasetConfig) -> None:
        self.subjects, self.config = subjects, config

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, index: int) -> SubjectSample:
        subject, config = self.subjects[index], self.config
        generator = torch.Generator().manual_seed(index) if config.deterministic else None
        order = torch.randperm(len(subject.photos), generator=generator).tolist()
        references, targets = split_references(order, config.num_views, config.num_targets)
        # each photo is decoded once
        images = {i: read_image(subject.photos[i]) for i in {*references, *targets}}
        return {
            "photos": torch.stack([to_tensor(images[i], config.encoder_size) for i in references]),
            "images": torch.stack([to_tensor(images[i], config.resolution) for i in targets]),
            "captions": [
                personalize_caption(
                    subject.captions[i], config.identifier, config.class_noun, config.template
                )
                for i in targets
            ],
            "subject_id": index,
        }


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
        identifier: What is put before the class noun. A caption that has it already stays.
        class_noun: Its first occurrence, with its article, becomes "identifier noun".
        template: Used without a caption, and put before one that lacks the class noun.

    Returns:
        The caption.
    """
    if caption is None:
        return template
    if re.search(rf"\b{re.escape(identifier)}\b", caption):
        return caption
    noun_pattern = rf"\b(?:(?:an?|the)\s+)?{re.escape(class_noun)}\b"
    subject_name = f"{identifier} {class_noun}"
    new_caption, num_replacements = re.subn(
        noun_pattern, lambda _: subject_name, caption, count=1, flags=re.IGNORECASE
    )
    return new_caption if num_replacements else f"{template}, {caption}"
