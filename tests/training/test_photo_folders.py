"""Folders of photos become batches: references, targets, their order and captions."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperlora.data.images import read_image, to_tensor
from hyperlora.data.subjects import list_subjects
from hyperlora.errors import InvalidArgumentError
from hyperlora.training.datamodules.base import FolderDataModule
from hyperlora.training.datamodules.photo_folders import PhotoFolderDataModule
from hyperlora.training.datamodules.photo_samples import (
    personalize_caption,
    split_references,
)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 4))
def test_split_references_keeps_targets_apart(
    num_photos: int, num_views: int, num_targets: int
) -> None:
    references, targets = split_references(range(num_photos), num_views, num_targets)
    assert (len(references), len(targets)) == (num_views, num_targets)
    if num_photos > 1:
        assert not set(references) & set(targets)
        # none comes twice before all have come
        assert len(set(references)) == min(num_views, num_photos - 1)
    else:
        assert set(references) == set(targets) == {0}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (None, "a photo of sks person"),
        ("a person in the rain", "sks person in the rain"),
        ("Portrait of the Person, smiling", "Portrait of sks person, smiling"),
        ("two persons", "a photo of sks person, two persons"),
        ("outdoors, red hat", "a photo of sks person, outdoors, red hat"),
        ("sks person with a person behind", "sks person with a person behind"),
    ],
)
def test_personalize_caption_names_the_subject(caption: str | None, expected: str) -> None:
    assert personalize_caption(caption, "sks", "person", "a photo of sks person") == expected


def test_photo_folders_match_captions_to_targets(workspace: Path) -> None:
    folder = workspace / "photos/train"
    data = PhotoFolderDataModule(
        str(folder),
        str(folder),
        resolution=16,
        encoder_size=12,
        batch_size=3,
        num_views=4,
        num_targets=2,
        num_workers=0,
    )
    batch = next(iter(data.train_dataloader()))
    assert batch.photos.shape == (3, 4, 3, 12, 12)
    assert batch.images.shape == (6, 3, 16, 16)
    subjects = list_subjects(folder)
    for j in range(2):
        for i, subject_id in enumerate(batch.subject_ids.tolist()):
            subject, image = subjects[subject_id], batch.images[j * 3 + i]
            photos = torch.stack([to_tensor(read_image(p), 16) for p in subject.photos])
            (index,) = (photos == image).flatten(1).all(1).nonzero().flatten().tolist()
            expected = (
                "a photo of sks person"
                if subject.captions[index] is None
                else "sks person in the rain"
            )
            assert batch.captions[j * 3 + i] == expected


def test_photo_folders_validate_on_the_same_photos(workspace: Path) -> None:
    folder = str(workspace / "photos/validation")
    data = PhotoFolderDataModule(folder, folder, resolution=16, batch_size=2, num_workers=0)
    first, second = next(iter(data.val_dataloader())), next(iter(data.val_dataloader()))
    assert len(first.captions) == 2
    assert first.images.equal(second.images)
    assert first.photos.equal(second.photos)


def test_photo_folders_refuse_a_batch_of_too_many_subjects(workspace: Path) -> None:
    folder = str(workspace / "photos/validation")
    with pytest.raises(
        InvalidArgumentError, match=r"holds 2 subjects, one step takes 3: .*lower batch_size"
    ):
        PhotoFolderDataModule(folder, folder, resolution=16, batch_size=3).train_dataloader()


def test_folder_data_module_without_a_dataset_cannot_be_made() -> None:
    with pytest.raises(TypeError, match=r"abstract method '?make_dataset"):
        FolderDataModule()
