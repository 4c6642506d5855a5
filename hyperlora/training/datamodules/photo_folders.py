"""Photos of subjects, from folders: what a hypernetwork for a real base is trained on."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from hyperlora.data.images import read_image, to_tensor
from hyperlora.data.subjects import Subject, list_subjects
from hyperlora.training.datamodules.base import FolderDataModule
from hyperlora.training.datamodules.collate import collate_subjects


class PhotoFolderDataModule(FolderDataModule):
    """Reference photos and other photos of the same subjects (``main_callback.data.subjects.list_subjects``), with captions.

    Batches are what ``HypernetworkTraining`` takes: ``load_photos`` at ``encoder_size``, target ``images`` at ``resolution``
    (the base's), ``captions``, and ``subject``, the number of the subject in order of names. Of a subject with too few
    photos some come twice; a target is never one of the references unless the subject has a single photo. Validation
    shows the same photos every time, one target each.

    A photo's own caption (its ``.txt``) has the class noun made personal ("a person in the rain": "sks person in the
    rain"); other photos get ``prompt_template``.

    Raises ``InvalidImageError`` for folders without subjects and photos that cannot be read, ``InvalidArgumentError`` if there are fewer
    training subjects than one step takes.
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
        self.save_hyperparameters(
            logger=False
        )  # `targets` means another thing in HypernetworkTraining

    def make_dataset(self, training: bool) -> "_PhotoDataset":
        h = self.hparams
        folder, num_targets = (h["folder"], h["num_targets"]) if training else (h["validation"], 1)
        template = h["prompt_template"].format(
            identifier=h["identifier"], class_noun=h["class_noun"]
        )
        return _PhotoDataset(
            list_subjects(folder),
            (h["encoder_size"], h["resolution"]),
            (h["num_views"], num_targets),
            (h["identifier"], h["class_noun"], template),
            deterministic=not training,
        )


class _PhotoDataset(Dataset[dict[str, Any]]):
    """One subject: references and targets drawn at random, or always the same ones if ``deterministic``."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        image_sizes: tuple[int, int],
        counts: tuple[int, int],
        caption_args: tuple[str, str, str],
        deterministic: bool,
    ) -> None:
        self.subjects, self.caption_args, self.deterministic = subjects, caption_args, deterministic
        self.encoder_size, self.resolution = image_sizes
        self.num_views, self.num_targets = counts

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, index: int) -> dict[str, Any]:
        subject = self.subjects[index]
        generator = torch.Generator().manual_seed(index) if self.deterministic else None
        order = torch.randperm(len(subject.photos), generator=generator).tolist()
        references, targets = split_references(order, self.num_views, self.num_targets)
        images_by_index = {
            i: read_image(subject.photos[i]) for i in {*references, *targets}
        }  # each is decoded once
        return {
            "photos": torch.stack(
                [to_tensor(images_by_index[i], self.encoder_size) for i in references]
            ),
            "images": torch.stack(
                [to_tensor(images_by_index[i], self.resolution) for i in targets]
            ),
            "captions": [
                personalize_caption(subject.captions[i], *self.caption_args) for i in targets
            ],
            "subject": index,
        }


def split_references(
    photos: Sequence[int], num_views: int, num_targets: int
) -> tuple[list[int], list[int]]:
    """``num_views`` references and ``num_targets`` others of one subject's photos: the first are references, all but one at
    most, and the rest targets, each repeated in turn where they are too few. A single photo is both."""
    references = list(photos[: min(num_views, max(1, len(photos) - 1))])
    target_photos = list(photos[len(references) :]) or references
    return (references * num_views)[:num_views], (target_photos * num_targets)[:num_targets]


def personalize_caption(
    caption: str | None, identifier: str, class_noun: str, template: str
) -> str:
    """A photo's caption about this very subject: the first class noun, with its article, becomes "identifier noun".
    Without a caption it is ``template``, and before a caption that does not name the class ``template`` is put."""
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
