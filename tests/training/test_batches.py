"""Batches move to devices as a whole, and are collated from samples."""

from dataclasses import fields

import pytest
import torch
from lightning import LightningModule

from hyperlora.training.batches import AttributeBatch, Batch, EditBatch, PairBatch, SubjectBatch
from hyperlora.training.datamodules.collate import SubjectSample, collate_subjects


def make_edit_sample(value: float) -> dict[str, object]:
    return {
        "before": torch.full((4, 2, 2), value),
        "after": torch.full((4, 2, 2), -value),
        "instructions": f"edit {value}",
        "labels": {"hair": int(value), "hat": 0},
    }


def make_subject_sample(subject_id: int, num_targets: int = 2) -> SubjectSample:
    return {
        "captions": [f"{subject_id} {j}" for j in range(num_targets)],
        "subject_id": subject_id,
        "photos": torch.full((3, 3, 4, 4), float(subject_id)),
        "latents": torch.arange(num_targets).view(-1, 1, 1, 1) + 10.0 * subject_id,
        "labels": [{"hair": 10 * subject_id + j} for j in range(num_targets)],
    }


def test_lightning_moves_a_frozen_batch() -> None:
    batch = EditBatch.collate([make_edit_sample(1.0), make_edit_sample(2.0)])
    moved = LightningModule().transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert type(moved) is EditBatch
    assert moved.before.device.type == moved.after.device.type == "meta"
    assert moved.labels is not None
    assert {labels.device.type for labels in moved.labels.values()} == {"meta"}
    assert moved.instructions == batch.instructions
    assert batch.before.device.type == "cpu"


def test_batch_to_keeps_missing_fields() -> None:
    batch = PairBatch.collate([{"instructions": "a", "tokens": torch.zeros(1, 2, 5, 7)}] * 3)
    moved = batch.to("meta")
    assert {f.name for f in fields(moved) if getattr(moved, f.name) is None} == {
        "pairs",
        "before",
        "after",
        "images",
        "undo_instructions",
        "labels_before",
        "labels_after",
    }
    assert moved.encoder_input.shape == (3, 1, 2, 5, 7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_batch_pins_all_tensors() -> None:
    batch = EditBatch.collate([make_edit_sample(1.0)]).pin_memory()
    assert batch.before.is_pinned()


def test_collate_stacks_tensors_integers_and_labels() -> None:
    sample = {
        "images": torch.ones(3, 2, 2),
        "labels": {"hair": 4},
        "geometry": torch.zeros(5),
        "subject_ids": 7,
    }
    batch = AttributeBatch.collate([sample, sample | {"subject_ids": 8}])
    assert batch.images.shape == (2, 3, 2, 2) and batch.geometry.shape == (2, 5)
    assert batch.subject_ids.tolist() == [7, 8]
    assert batch.labels["hair"].tolist() == [4, 4]


def test_collate_rejects_unknown_fields() -> None:
    with pytest.raises(TypeError, match="photo"):
        AttributeBatch.collate([{"photo": torch.zeros(3)}])


def test_collate_subjects_orders_targets_before_subjects() -> None:
    batch = collate_subjects([make_subject_sample(1), make_subject_sample(2)])
    assert isinstance(batch, SubjectBatch) and isinstance(batch, Batch)
    assert batch.captions == ["1 0", "2 0", "1 1", "2 1"]
    assert batch.photos is not None and batch.photos.shape == (2, 3, 3, 4, 4)
    assert batch.latents is not None and batch.latents.flatten().tolist() == [10, 20, 11, 21]
    assert batch.labels is not None and batch.labels["hair"].tolist() == [10, 20, 11, 21]
    assert batch.subject_ids.tolist() == [1, 2]
    assert batch.tokens is None and batch.images is None
