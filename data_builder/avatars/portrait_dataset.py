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

from data_builder.avatars.identity import SPLITS, Identity, Scene, identity, scene
from data_builder.avatars.rendering import draw
from hyperlora.progress import track


@dataclass(frozen=True)
class Plan:
    """``people`` persons of a split from its ``start``-th on, ``each`` portraits of every one, ``size`` pixels."""

    split: str
    people: int
    each: int
    size: int = 128
    start: int = 0

    def seeds(self) -> range:
        return SPLITS[self.split][self.start : self.start + self.people]


class Portraits:
    """Drawn portraits in person order: ``images`` uint8 [people * each, size, size, 3], memory-mapped."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        self.plan = Plan(**json.loads((folder / "plan.json").read_text()))
        self.images: np.ndarray = np.load(folder / "images.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.images)

    def person(self, index: int) -> Identity:
        return identity(self.plan.seeds()[index // self.plan.each])

    def scene(self, index: int) -> Scene:
        return scene(self.plan.seeds()[index // self.plan.each], index % self.plan.each)


def draw_portraits(folder: Path, plan: Plan, workers: int | None = None) -> None:
    """Draw a dataset into ``folder``; does nothing if the same plan is already there."""
    jobs = ((seed, plan.each, plan.size) for seed in plan.seeds())
    draw_into(
        folder, asdict(plan), plan.people, plan.each, plan.size, _draw_person, jobs, f"{plan.split} people", workers
    )


def draw_into(
    folder: Path, plan: dict[str, Any], jobs_count: int, each: int, size: int, work: Callable[[Any], np.ndarray],
    jobs: Iterable[Any], label: str, workers: int | None = None,
) -> None:  # fmt: skip
    """``images.npy`` of what ``work`` draws for every job, ``each`` pictures a job, and ``plan.json``, which is written
    last, so an interrupted run leaves no dataset that looks complete."""
    done = folder / "plan.json"
    if done.exists() and json.loads(done.read_text()) == plan:
        return
    done.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    images = open_memmap(folder / "images.npy", "w+", np.uint8, (jobs_count * each, size, size, 3))
    with get_context("spawn").Pool(workers or os.cpu_count()) as pool:
        drawn = pool.imap(work, jobs, chunksize=8)
        for i, pictures in enumerate(track(drawn, "drawing", label, jobs_count)):
            images[i * each : (i + 1) * each] = pictures
    images.flush()
    done.write_text(json.dumps(plan))


def _draw_person(job: tuple[int, int, int]) -> np.ndarray:
    seed, each, size = job
    who = identity(seed)
    return np.stack([np.asarray(draw(who, scene(seed, k), size)) for k in range(each)])
