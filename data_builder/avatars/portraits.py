"""The drawn dataset on disk: one memory-mapped image array and the seeds that made it."""

import json
import os
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from data_builder.avatars.drawing import draw
from data_builder.avatars.people import SPLITS, Identity, Scene, identity, scene
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
    """Draw a dataset into ``folder``; does nothing if the same plan is already there. ``plan.json`` is written last,
    so an interrupted run leaves no dataset that looks complete."""
    done = folder / "plan.json"
    if done.exists() and json.loads(done.read_text()) == asdict(plan):
        return
    done.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (plan.people * plan.each, plan.size, plan.size, 3)
    images = open_memmap(folder / "images.npy", "w+", np.uint8, shape)
    with get_context("spawn").Pool(workers or os.cpu_count()) as pool:
        jobs = ((seed, plan.each, plan.size) for seed in plan.seeds())
        drawn = pool.imap(_draw_person, jobs, chunksize=8)
        for i, portraits in enumerate(track(drawn, f"drawing {plan.split}", "people", plan.people)):
            images[i * plan.each : (i + 1) * plan.each] = portraits
    images.flush()
    done.write_text(json.dumps(asdict(plan)))


def _draw_person(job: tuple[int, int, int]) -> np.ndarray:
    seed, each, size = job
    who = identity(seed)
    return np.stack([np.asarray(draw(who, scene(seed, k), size)) for k in range(each)])
