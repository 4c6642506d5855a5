"""Photos of subjects, from folders: what a hypernetwork for a real base is trained on."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from hyperlora.data.images import read_image, to_tensor
from hyperlora.data.subjects import Subject, subjects_in
from hyperlora.training.datamodules.base import FolderData
from hyperlora.training.datamodules.collate import collate_subjects


class PhotoFolders(FolderData):
    """Reference photos and other photos of the same subjects (``hyperlora.data.subjects.subjects_in``), with captions.

    Batches are what ``HypernetworkTraining`` takes: ``photos`` at ``encoder_size``, target ``images`` at ``resolution``
    (the base's), ``captions``, and ``subject``, the number of the subject in order of names. Of a subject with too few
    photos some come twice; a target is never one of the references unless the subject has a single photo. Validation
    shows the same photos every time, one target each.

    A photo's own caption (its ``.txt``) has the class noun made personal ("a person in the rain": "sks person in the
    rain"); other photos get ``prompt_template``.

    Raises ``BadImage`` for folders without subjects and photos that cannot be read, ``BadRequest`` if there are fewer
    training subjects than one step takes.
    """

    noun = "subjects"
    collate = staticmethod(collate_subjects)

    def __init__(
        self,
        folder: str,
        validation: str,
        resolution: int,
        encoder_size: int = 224,
        batch_size: int = 4,
        views: int = 4,
        targets: int = 1,
        class_noun: str = "person",
        identifier: str = "sks",
        prompt_template: str = "a photo of {identifier} {class_noun}",
        workers: int = 4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # `targets` means another thing in HypernetworkTraining

    def dataset(self, training: bool) -> "_Photos":
        h = self.hparams
        folder, targets = (h["folder"], h["targets"]) if training else (h["validation"], 1)
        template = h["prompt_template"].format(identifier=h["identifier"], class_noun=h["class_noun"])
        return _Photos(
            subjects_in(folder), (h["encoder_size"], h["resolution"]), (h["views"], targets),
            (h["identifier"], h["class_noun"], template), fixed=not training,
        )  # fmt: skip


class _Photos(Dataset[dict[str, Any]]):
    """One subject: references and targets drawn at random, or always the same ones if ``fixed``."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        sizes: tuple[int, int],
        counts: tuple[int, int],
        wording: tuple[str, str, str],
        fixed: bool,
    ) -> None:
        self.subjects, self.wording, self.fixed = subjects, wording, fixed
        self.encoder_size, self.resolution = sizes
        self.views, self.targets = counts

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, index: int) -> dict[str, Any]:
        subject = self.subjects[index]
        generator = torch.Generator().manual_seed(index) if self.fixed else None
        order = torch.randperm(len(subject.photos), generator=generator).tolist()
        references, targets = dealt(order, self.views, self.targets)
        image = {i: read_image(subject.photos[i]) for i in {*references, *targets}}  # each is decoded once
        return {
            "photos": torch.stack([to_tensor(image[i], self.encoder_size) for i in references]),
            "images": torch.stack([to_tensor(image[i], self.resolution) for i in targets]),
            "captions": [personal(subject.captions[i], *self.wording) for i in targets],
            "subject": index,
        }


def dealt(photos: Sequence[int], views: int, targets: int) -> tuple[list[int], list[int]]:
    """``views`` references and ``targets`` others of one subject's photos: the first are references, all but one at
    most, and the rest targets, each repeated in turn where they are too few. A single photo is both."""
    references = list(photos[: min(views, max(1, len(photos) - 1))])
    others = list(photos[len(references) :]) or references
    return (references * views)[:views], (others * targets)[:targets]


def personal(caption: str | None, identifier: str, class_noun: str, template: str) -> str:
    """A photo's caption about this very subject: the first class noun, with its article, becomes "identifier noun".
    Without a caption it is ``template``, and before a caption that does not name the class ``template`` is put."""
    if caption is None:
        return template
    if re.search(rf"\b{re.escape(identifier)}\b", caption):
        return caption
    noun = rf"\b(?:(?:an?|the)\s+)?{re.escape(class_noun)}\b"
    name = f"{identifier} {class_noun}"
    personalised, found = re.subn(noun, lambda _: name, caption, count=1, flags=re.IGNORECASE)
    return personalised if found else f"{template}, {caption}"
