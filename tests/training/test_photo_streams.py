"""Streams of shards become batches without an end, each rank from its own shards."""

from pathlib import Path

import numpy as np
import pytest

from hyperlora.data.hub_subjects import HubStream
from hyperlora.data.open_subject_source import open_subject_source
from hyperlora.data.subject_shards import write_subject_shards
from hyperlora.data.subject_sources import FolderSource
from hyperlora.errors import InvalidArgumentError
from hyperlora.training.datamodules.photo_dataset import PhotoStreamDataset
from hyperlora.training.datamodules.photo_folders import PhotoFolderDataModule
from hyperlora.training.datamodules.photo_samples import SampleMaker
from hyperlora.training.datamodules.target_cache import TargetCacheConfig
from tests.training.test_photo_folders import save_photos
from tests.training.test_photo_samples import make_sample_config


def test_stream_of_shards_makes_batches_without_end(tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "p", {f"p{i}": [(30, 26)] * (1 + i % 3) for i in range(7)})
    subjects = FolderSource(str(folder)).list_subjects()
    shards = tmp_path / "shards"
    num_shards = len(write_subject_shards(subjects, shards, photos_per_shard=4))
    data = PhotoFolderDataModule(
        str(shards), str(folder), resolution=16, encoder_size=16, batch_size=3, num_workers=2
    )
    data.setup("fit")
    loader = iter(data.train_dataloader())
    batches = [next(loader) for _ in range(12)]
    assert {tuple(batch.images.shape) for batch in batches} == {(3, 3, 16, 16)}
    seen = {batch.images[i].numpy().tobytes() for batch in batches for i in range(3)}
    assert len(seen) > 7
    assert any(f"a stream of {num_shards} shards" in note for note in data.describe())
    data.hparams["num_workers"] = num_shards + 1
    with pytest.raises(InvalidArgumentError, match="lower num_workers"):
        data.train_dataloader()
    with pytest.raises(InvalidArgumentError, match="cache needs all photos at once"):
        PhotoFolderDataModule(
            str(shards), str(folder), resolution=16, cache=TargetCacheConfig("c", "b")
        ).setup("fit")


def test_stream_ranks_read_disjoint_subjects(tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "p", {f"p{i}": [(9, 9)] for i in range(8)})
    subjects = FolderSource(str(folder)).list_subjects()
    write_subject_shards(subjects, tmp_path / "shards", photos_per_shard=2)
    names = []
    for rank in range(2):
        stream = open_subject_source(str(tmp_path / "shards"))
        assert isinstance(stream, HubStream)
        data = PhotoStreamDataset(stream, SampleMaker(make_sample_config()), 2, seed=0)
        data.rank, data.num_ranks = rank, 2
        counted = data._shuffle_subjects(np.random.default_rng(0), {})
        names.append({next(counted).name for _ in range(12)})  # three passes
    assert names[0] | names[1] == {f"p{i}" for i in range(8)}
    assert not names[0] & names[1]


def test_stream_leaves_out_photos_by_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_photos(tmp_path / "p", {f"p{i}": [(9, 9)] for i in range(4)})
    subjects = FolderSource(str(folder)).list_subjects()
    write_subject_shards(subjects, tmp_path / "shards")
    stream = open_subject_source(str(tmp_path / "shards"))
    assert isinstance(stream, HubStream)
    maker = SampleMaker(make_sample_config())
    data = PhotoStreamDataset(
        stream, maker, 1, 0, lambda photo: "no face was found" if "1" in photo.key[7] else None
    )
    batches = iter(data)
    for _ in range(6):
        next(batches)
    error = capsys.readouterr().err
    assert "warning: 1 photo(s) left out because no face was found" in error
