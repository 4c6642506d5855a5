"""Plans of samples: who is a reference, who a target, and which rank has which batch."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperlora.data.photos import EncodedPhoto, SubjectPhotos
from hyperlora.diffusion.conditions import Conditions
from hyperlora.training.augmentation import AugmentationConfig
from hyperlora.training.datamodules.collate import SubjectSample, collate_subjects
from hyperlora.training.datamodules.photo_dataset import BatchPlanSampler, EpochPlanner
from hyperlora.training.datamodules.photo_samples import (
    SampleConfig,
    SampleMaker,
    plan_sample,
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


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=9),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 5),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_ranks_share_the_batches_of_an_epoch(
    num_photos: list[int], batch_size: int, num_ranks: int, epoch: int, has_buckets: bool
) -> None:
    subjects = [
        SubjectPhotos(f"s{i}", tuple(EncodedPhoto(f"{i}/{n}", None, b"") for n in range(size)))
        for i, size in enumerate(num_photos)
    ]
    buckets = [(64, 128), (128, 64)]
    planner = EpochPlanner(
        subjects,
        SampleMaker(make_sample_config()),
        batch_size,
        seed=7,
        get_size=(lambda photo: buckets[int(photo.key[-1]) % 2]) if has_buckets else None,
    )
    batches = planner.plan_training(epoch)
    assert batches == planner.plan_training(epoch)
    assert len(batches) == planner.num_training_batches == len(subjects) // batch_size
    for batch in batches:
        assert len(batch) == batch_size
        assert len({plan.size for plan in batch}) == 1
    if not has_buckets:
        indices = [plan.subject_index for batch in batches for plan in batch]
        assert len(set(indices)) == len(indices)
    parts = []
    for rank in range(num_ranks):
        sampler = BatchPlanSampler(planner.plan_training, len(batches), num_ranks, rank)
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == len(parts[0])
    merged = [parts[i % num_ranks][i // num_ranks] for i in range(len(parts[0]) * num_ranks)]
    assert merged == batches[: len(merged)]


@pytest.mark.parametrize("repeats", [(1, 1, 1), (4, 1, 2), (1, 7, 3)])
def test_subjects_are_repeated_in_an_epoch(repeats: tuple[int, ...]) -> None:
    subjects = [
        SubjectPhotos(f"s{i}", (EncodedPhoto(f"{i}", None, b""),), repeats=n)
        for i, n in enumerate(repeats)
    ]
    planner = EpochPlanner(subjects, SampleMaker(make_sample_config()), 1, seed=3)
    batches = planner.plan_training(0)
    assert len(batches) == planner.num_training_batches == sum(repeats)
    counts = Counter(plan.subject_index for batch in batches for plan in batch)
    assert tuple(counts[i] for i in range(3)) == repeats
    assert len(planner.plan_validation(0)) == 3


def make_sample_config(**options: Any) -> SampleConfig:
    return SampleConfig(
        **{
            "source": "photos",
            "encoder_size": 8,
            "resolution": 64,
            "num_views": 2,
            "num_targets": 2,
            "num_crops": 1,
            "identifier": "sks",
            "class_noun": "person",
            "template": "sks person",
            "augmentation": AugmentationConfig(),
            **options,
        }
    )


@given(
    st.integers(1, 6), st.integers(0, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 9)
)
def test_plan_never_has_a_target_among_the_references(
    num_photos: int, num_generated: int, num_views: int, num_targets: int, seed: int
) -> None:
    photos = tuple(EncodedPhoto(f"p{i}", None, b"") for i in range(num_photos))
    views = tuple(EncodedPhoto(f"v{i}", None, b"") for i in range(num_generated))
    config = make_sample_config(num_views=num_views, num_targets=num_targets)
    plan = plan_sample(SubjectPhotos("s", photos, views), 0, config, np.random.default_rng(seed))
    assert (len(plan.references), len(plan.targets)) == (num_views, num_targets)
    assert all(i < num_photos for i in plan.targets)
    if num_photos + num_generated > 1:
        assert not set(plan.references) & set(plan.targets)
        assert plan.seed is None
    else:
        assert plan.seed is not None


def test_collated_conditions_are_padded_in_the_order_of_targets() -> None:
    samples: list[SubjectSample] = []
    for subject_id, lengths in enumerate([(3, 5), (4, 2)]):
        conditions: list[Conditions] = [
            {
                "prompt_embeds": torch.full((1, length, 2), 10 * subject_id + j + 1.0),
                "prompt_embeds_mask": torch.ones(1, length, dtype=torch.bool),
            }
            for j, length in enumerate(lengths)
        ]
        samples.append({"captions": ["a", "b"], "subject_id": subject_id, "conditions": conditions})
    batch = collate_subjects(samples).to("cpu")
    assert batch.conditions is not None
    assert batch.conditions["prompt_embeds"].shape == (4, 5, 2)
    # target j of subject i at j * n + i
    assert batch.conditions["prompt_embeds"][:, 0, 0].tolist() == [1, 11, 2, 12]
    assert batch.conditions["prompt_embeds_mask"].sum(1).tolist() == [3, 4, 5, 2]
    without = collate_subjects([{"captions": ["a"], "subject_id": 0}])
    assert without.conditions is None
