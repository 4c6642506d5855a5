"""Drawn before/after pairs on disk: one memory-mapped image array and the plan that made it."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_builder.avatars.edits import Pair, pairs_of, vocabulary
from data_builder.avatars.portrait_dataset import draw_into
from data_builder.avatars.rendering import draw


@dataclass(frozen=True)
class PairPlan:
    """``groups`` changes of a split, each made on ``people`` people; a share of ``two`` are two changes at once."""

    split: str
    groups: int
    people: int = 2
    size: int = 128
    two: float = 0.2

    def group(self, number: int) -> list[Pair]:
        return pairs_of(self.split, number, self.people, two=self.two)


class DrawnPairs:
    """``images`` uint8 [2 * people * groups, size, size, 3], memory-mapped: person after person, before and after."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        self.plan = PairPlan(**json.loads((folder / "plan.json").read_text()))
        self.images: np.ndarray = np.load(folder / "images.npy", mmap_mode="r")

    def __len__(self) -> int:
        return self.plan.groups * self.plan.people

    def pairs(self) -> list[Pair]:
        """All pairs; the pictures of pair i are 2 i and 2 i + 1."""
        return [pair for number in range(self.plan.groups) for pair in self.plan.group(number)]


def draw_pairs(folder: Path, plan: PairPlan, workers: int | None = None) -> None:
    """Draw a dataset into ``folder``, with the vocabulary of its changes; what is already there by the same plan stays
    as it is."""
    jobs = ((plan, number) for number in range(plan.groups))
    draw_into(
        folder, asdict(plan), plan.groups, 2 * plan.people, plan.size, _draw_group, jobs,
        f"{plan.split} changes", workers,
    )  # fmt: skip
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary(), indent=1))


def _draw_group(job: tuple[PairPlan, int]) -> np.ndarray:
    plan, number = job
    portraits = [p for pair in plan.group(number) for p in (pair.before, pair.after)]
    return np.stack([np.asarray(draw(who, how, plan.size)) for who, how in portraits])
