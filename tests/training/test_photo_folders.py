"""Folders of photos become batches: who is reference, who is target, in which order, under which words."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperlora.data.images import read_image, to_tensor
from hyperlora.data.subjects import list_subjects
from hyperlora.errors import InvalidArgumentError
from hyperlora.training.datamodules.photo_folders import (
    PhotoFolderDataModule,
    personalize_caption,
    split_references,
)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 4))
def test_targets_are_never_references_unless_there_is_one_photo(
    photos: int, views: int, targets: int
) -> None:
    references, others = split_references(range(photos), views, targets)
    assert (len(references), len(others)) == (views, targets)
    if photos > 1:
        assert not set(references) & set(others)
        assert len(set(references)) == min(
            views, photos - 1
        )  # none comes twice before all have come
    else:
        assert set(references) == set(others) == {0}


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
def test_captions_become_personal(caption: str | None, expected: str) -> None:
    assert personalize_caption(caption, "sks", "person", "a photo of sks person") == expected


def test_batches_are_in_the_order_loras_are_shared_in(workspace: Path) -> None:
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
    assert batch["photos"].shape == (3, 4, 3, 12, 12)
    assert batch["images"].shape == (6, 3, 16, 16)
    subjects = list_subjects(folder)
    for j in range(2):
        for i, number in enumerate(batch["subject"].tolist()):
            subject, image = subjects[number], batch["images"][j * 3 + i]
            photos = torch.stack([to_tensor(read_image(p), 16) for p in subject.photos])
            (which,) = (photos == image).flatten(1).all(1).nonzero().flatten().tolist()
            expected = (
                "a photo of sks person"
                if subject.captions[which] is None
                else "sks person in the rain"
            )
            assert batch["captions"][j * 3 + i] == expected


def test_validation_is_the_same_every_time(workspace: Path) -> None:
    folder = str(workspace / "photos/validation")
    data = PhotoFolderDataModule(folder, folder, resolution=16, batch_size=2, num_workers=0)
    one, other = next(iter(data.val_dataloader())), next(iter(data.val_dataloader()))
    assert len(one["captions"]) == 2
    assert one["images"].equal(other["images"])
    assert one["photos"].equal(other["photos"])


def test_a_step_that_takes_more_subjects_than_there_are_is_refused(workspace: Path) -> None:
    folder = str(workspace / "photos/validation")
    with pytest.raises(
        InvalidArgumentError, match=r"holds 2 subjects, one step takes 3: .*lower batch_size"
    ):
        PhotoFolderDataModule(folder, folder, resolution=16, batch_size=3).train_dataloader()
