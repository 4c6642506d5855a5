"""The drawn dataset on disk: one memory-mapped image array and the seeds that made it."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from data_builder.avatars.identity import (
    SPLITS,
    AvatarIdentity,
    Scene,
    sample_identity,
    sample_scene,
)
from data_builder.avatars.rendering import render_portrait
from hyperlora.progress import track


@dataclass(frozen=True)
class PortraitDatasetConfig:
    """``num_identities`` persons of a split from its ``offset``-th on, ``each`` portraits of every one, ``size`` pixels."""

    split: str
    num_identities: int
    portraits_per_identity: int
    size: int = 128
    offset: int = 0

    def list_seeds(self) -> range:
        return SPLITS[self.split][self.offset : self.offset + self.num_identities]


class PortraitDataset:
    """Drawn portraits in person order: ``images`` uint8 [people * each, size, size, 3], memory-mapped."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        self.config = PortraitDatasetConfig(**json.loads((folder / "plan.json").read_text()))
        self.images: np.ndarray = np.load(folder / "images.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.images)

    def get_identity(self, index: int) -> AvatarIdentity:
        return sample_identity(
            self.config.list_seeds()[index // self.config.portraits_per_identity]
        )

    def get_scene(self, index: int) -> Scene:
        return sample_scene(
            self.config.list_seeds()[index // self.config.portraits_per_identity],
            index % self.config.portraits_per_identity,
        )


def draw_portraits(
    folder: Path, config: PortraitDatasetConfig, num_workers: int | None = None
) -> None:
    """Draw a dataset into ``folder``; does nothing if the same plan is already there."""
    jobs = ((seed, config.portraits_per_identity, config.size) for seed in config.list_seeds())
    draw_dataset(
        folder,
        asdict(config),
        config.num_identities,
        config.portraits_per_identity,
        config.size,
        _draw_identity,
        jobs,
        f"{config.split} people",
        num_workers,
    )


def draw_dataset(
    folder: Path,
    config: dict[str, Any],
    num_jobs: int,
    images_per_job: int,
    size: int,
    draw_fn: Callable[[Any], np.ndarray],
    jobs: Iterable[Any],
    label: str,
    num_workers: int | None = None,
) -> None:
    """``images.npy`` of what ``draw_fn`` draws for every job, ``each`` pictures a job, and ``config.json``, which is written
    last, so an interrupted run leaves no dataset that looks complete."""
    config_path = folder / "plan.json"
    if config_path.exists() and json.loads(config_path.read_text()) == config:
        return
    config_path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    images = open_memmap(
        folder / "images.npy", "w+", np.uint8, (num_jobs * images_per_job, size, size, 3)
    )
    with get_context("spawn").Pool(num_workers or os.cpu_count()) as pool:
        results = pool.imap(draw_fn, jobs, chunksize=8)
        for i, job_images in enumerate(track(results, "drawing", label, num_jobs)):
            images[i * images_per_job : (i + 1) * images_per_job] = job_images
    images.flush()
    config_path.write_text(json.dumps(config))


def _draw_identity(job: tuple[int, int, int]) -> np.ndarray:
    seed, num_portraits, size = job
    person = sample_identity(seed)
    return np.stack(
        [
            np.asarray(render_portrait(person, sample_scene(seed, k), size))
            for k in range(num_portraits)
        ]
    )
