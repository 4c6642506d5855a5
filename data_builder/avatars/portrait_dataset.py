"""Drawn portraits on disk: one memory-mapped image array and the seeds that made it."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

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

Job = TypeVar("Job")


@dataclass(frozen=True)
class PortraitDatasetConfig:
    """Which identities are drawn, and how.

    Attributes:
        split: ``train``, ``validation`` or ``test``.
        num_identities: Number of identities of the split.
        portraits_per_identity: Portraits of each identity.
        size: Side of the images in pixels.
        offset: Position of the first identity in the split.
    """

    split: str
    num_identities: int
    portraits_per_identity: int
    size: int = 128
    offset: int = 0

    def list_seeds(self) -> range:
        """List the seeds of the identities in order."""
        return SPLITS[self.split][self.offset : self.offset + self.num_identities]


class PortraitDataset:
    """Portraits that ``draw_portraits`` wrote, identity after identity.

    Args:
        folder: Folder of ``plan.json`` and ``images.npy``.

    Attributes:
        config: Configuration they were drawn by.
        images: uint8 [num_identities * portraits_per_identity, size, size, 3], memory-mapped.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        self.config = PortraitDatasetConfig(**json.loads((folder / "plan.json").read_text()))
        self.images: np.ndarray = np.load(folder / "images.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.images)

    def get_identity(self, index: int) -> AvatarIdentity:
        """Return the identity of a portrait by its position in ``images``."""
        return sample_identity(
            self.config.list_seeds()[index // self.config.portraits_per_identity]
        )

    def get_scene(self, index: int) -> Scene:
        """Return the scene of a portrait by its position in ``images``."""
        return sample_scene(
            self.config.list_seeds()[index // self.config.portraits_per_identity],
            index % self.config.portraits_per_identity,
        )


def draw_portraits(
    folder: Path, config: PortraitDatasetConfig, num_workers: int | None = None
) -> None:
    """Draw a dataset of portraits; does nothing if the same configuration is already there.

    Args:
        folder: Folder to write.
        config: Identities and image size.
        num_workers: Number of processes, by default one per core.
    """
    draw_dataset(
        folder,
        asdict(config),
        [(seed, config.portraits_per_identity, config.size) for seed in config.list_seeds()],
        _draw_identity,
        images_per_job=config.portraits_per_identity,
        size=config.size,
        unit=f"{config.split} identities",
        num_workers=num_workers,
    )


def draw_dataset(
    folder: Path,
    plan: Mapping[str, object],
    jobs: Sequence[Job],
    draw_fn: Callable[[Job], np.ndarray],
    *,
    images_per_job: int,
    size: int,
    unit: str,
    num_workers: int | None = None,
) -> None:
    """Draw images job by job in several processes into ``images.npy``.

    ``plan.json`` is written last, so that an interrupted run leaves no dataset that looks complete.

    Args:
        folder: Folder to write.
        plan: What is drawn, as JSON; nothing happens if the folder holds the same.
        jobs: Arguments of ``draw_fn``, one per job.
        draw_fn: Picklable function from a job to images, uint8 [images_per_job, size, size, 3].
        images_per_job: Images that each job draws.
        size: Side of the images in pixels.
        unit: Plural noun of a job in the progress bar.
        num_workers: Number of processes, by default one per core.
    """
    plan_path = folder / "plan.json"
    if plan_path.exists() and json.loads(plan_path.read_text()) == plan:
        return
    plan_path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (len(jobs) * images_per_job, size, size, 3)
    images = open_memmap(folder / "images.npy", "w+", np.uint8, shape)
    with get_context("spawn").Pool(num_workers or os.cpu_count()) as pool:
        results = pool.imap(draw_fn, jobs, chunksize=8)
        for i, job_images in enumerate(track(results, "drawing", unit, len(jobs))):
            images[i * images_per_job : (i + 1) * images_per_job] = job_images
    images.flush()
    plan_path.write_text(json.dumps(plan))


def _draw_identity(job: tuple[int, int, int]) -> np.ndarray:
    """Draw the portraits of one identity, uint8 [portraits, size, size, 3]."""
    seed, num_portraits, size = job
    person = sample_identity(seed)
    return np.stack(
        [
            np.asarray(render_portrait(person, sample_scene(seed, k), size))
            for k in range(num_portraits)
        ]
    )
