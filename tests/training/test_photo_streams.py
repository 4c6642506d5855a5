"""Streams of shards become batches without an end, each rank from its own shards."""

import ast
import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from hyperlora.data.hub_subjects import HubStream
from hyperlora.data.open_subject_source import open_subject_source
from hyperlora.data.subject_shards import write_subject_shards
from hyperlora.data.subject_sources import FolderSource
from hyperlora.errors import InvalidArgumentError
from hyperlora.training.batches import SubjectBatch
from hyperlora.training.callbacks import PerBatchSeed
from hyperlora.training.datamodules import photo_stream
from hyperlora.training.datamodules.photo_folders import PhotoFolderDataModule
from hyperlora.training.datamodules.photo_samples import SampleMaker
from hyperlora.training.datamodules.photo_stream import PhotoStreamDataset, PhotoStreamLoader
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
        blocks = data._iterate_blocks(0, None, {})
        names.append({s.name for _ in range(3) for s in next(blocks).subjects})  # three passes
    assert names[0] | names[1] == {f"p{i}" for i in range(8)}
    assert not names[0] & names[1]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_goes_on_where_it_was(
    num_ranks: int, num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where subjects of rare sizes wait for others through several blocks and passes."""
    monkeypatch.setattr(photo_stream, "BLOCK_SIZE", 3)
    monkeypatch.setattr(photo_stream, "_MAX_WAIT", 4)
    sizes = [(40, 20), (20, 40), (30, 30), (20, 41), (31, 30)]
    folder = save_photos(tmp_path / "p", {f"p{i}": [sizes[i % 5]] * (1 + i % 2) for i in range(17)})
    subjects = FolderSource(str(folder)).list_subjects()
    write_subject_shards(subjects, tmp_path / "shards", photos_per_shard=2)

    def make_data() -> PhotoStreamDataset:
        stream = open_subject_source(str(tmp_path / "shards"))
        assert isinstance(stream, HubStream)
        data = PhotoStreamDataset(
            stream,
            SampleMaker(make_sample_config()),
            2,
            seed=5,
            get_size=lambda photo: (16, 8) if photo.read_size()[0] > 35 else (8, 8),
        )
        data.rank, data.num_ranks = num_ranks - 1, num_ranks
        return data

    def read_batches(data: PhotoStreamDataset, count: int) -> list[tuple[list[int], bytes]]:
        batches = []
        for batch in itertools.islice(PhotoStreamLoader(data, num_workers, False), count):
            assert batch.progress is not None and batch.images is not None
            data.record_batch(batch.progress, num_workers)
            batches.append((batch.subject_ids.tolist(), batch.images.numpy().tobytes()))
        return batches

    straight = read_batches(make_data(), 30)
    assert len({batch for _, batch in straight}) > 20
    for num_steps in (5,) if num_workers else (1, 4, 21):
        data = make_data()
        assert read_batches(data, num_steps) == straight[:num_steps]
        resumed = make_data()
        resumed.seed = 0
        # as a checkpoint holds it
        position = ast.literal_eval(repr(data.get_position(num_workers)))
        assert resumed.restore_position(position, num_workers)
        assert read_batches(resumed, 30 - num_steps) == straight[num_steps:]
        assert not resumed.restore_position(position, num_workers + 1)


class CountingModule(L.LightningModule):
    """Trains one number, and writes down the subjects and pixels of each batch."""

    def __init__(self, log_dir: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.log_dir = log_dir

    def training_step(self, batch: SubjectBatch, batch_idx: int) -> Tensor:
        assert batch.images is not None
        path = self.log_dir / f"{self.global_rank}.txt"
        with path.open("a") as file:
            file.write(f"{batch.subject_ids.tolist()} {batch.images.double().sum():.9f}\n")
        return self.weight * batch.images.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(
    folder: Path, name: str, max_steps: int, num_devices: int, num_workers: int, **options: Any
) -> list[list[str]]:
    """Train on the shards in a folder; return the lines that each rank wrote."""
    log_dir = folder / name
    log_dir.mkdir()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=num_devices,
        strategy="ddp_fork" if num_devices > 1 else "auto",
        max_steps=max_steps,
        limit_train_batches=5,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            PerBatchSeed(),
            ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=3),
        ],
    )
    data = PhotoFolderDataModule(
        str(folder / "shards"),
        str(folder / "p"),
        resolution=16,
        encoder_size=16,
        batch_size=2,
        num_workers=num_workers,
    )
    trainer.fit(CountingModule(log_dir), data, **options)
    return [path.read_text().splitlines() for path in sorted(log_dir.glob("*.txt"))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, about so small a training
@pytest.mark.parametrize(("num_devices", "num_workers"), [(1, 0), (1, 2), (2, 1)])
def test_resumed_run_sees_the_samples_of_a_straight_run(
    num_devices: int, num_workers: int, tmp_path: Path
) -> None:
    """Stopped within an epoch of five steps; each rank and loader process has its position."""
    folder = save_photos(tmp_path / "p", {f"p{i}": [(30, 26)] * (1 + i % 3) for i in range(13)})
    write_subject_shards(
        FolderSource(str(folder)).list_subjects(), tmp_path / "shards", photos_per_shard=2
    )
    straight = fit(tmp_path, "straight", 9, num_devices, num_workers)
    assert [len(lines) for lines in straight] == [9] * num_devices
    assert len({line for lines in straight for line in lines}) > 8 * num_devices
    ckpt_path = tmp_path / "step=3.ckpt"
    assert ckpt_path.is_file()
    resumed = fit(tmp_path, "resumed", 9, num_devices, num_workers, ckpt_path=ckpt_path)
    assert resumed == [lines[3:] for lines in straight]


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
