"""Drawn before/after pairs on disk: one memory-mapped image array and the plan that made it."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_builder.avatars.edits import AvatarPair, build_vocabulary, sample_pairs
from data_builder.avatars.portrait_dataset import draw_dataset
from data_builder.avatars.rendering import render_portrait


@dataclass(frozen=True)
class PairDatasetConfig:
    """``num_edits`` changes of a split, each made on ``identities_per_edit`` people; a share of ``two_edit_fraction`` are two changes at once."""

    split: str
    num_edits: int
    identities_per_edit: int = 2
    size: int = 128
    two_edit_fraction: float = 0.2

    def sample_edit_pairs(self, edit_index: int) -> list[AvatarPair]:
        return sample_pairs(
            self.split,
            edit_index,
            self.identities_per_edit,
            two_edit_fraction=self.two_edit_fraction,
        )


class PairDataset:
    """``images`` uint8 [2 * people * groups, size, size, 3], memory-mapped: person after person, before and after."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        self.config = PairDatasetConfig(**json.loads((folder / "plan.json").read_text()))
        self.images: np.ndarray = np.load(folder / "images.npy", mmap_mode="r")

    def __len__(self) -> int:
        return self.config.num_edits * self.config.identities_per_edit

    def list_pairs(self) -> list[AvatarPair]:
        """All pairs; the pictures of pair i are 2 i and 2 i + 1."""
        return [
            pair
            for number in range(self.config.num_edits)
            for pair in self.config.sample_edit_pairs(number)
        ]


def draw_pairs(folder: Path, config: PairDatasetConfig, num_workers: int | None = None) -> None:
    """Draw a dataset into ``folder``, with the vocabulary of its changes; what is already there by the same plan stays
    as it is."""
    jobs = ((config, number) for number in range(config.num_edits))
    draw_dataset(
        folder,
        asdict(config),
        config.num_edits,
        2 * config.identities_per_edit,
        config.size,
        _draw_edit_pairs,
        jobs,
        f"{config.split} changes",
        num_workers,
    )
    (folder / "vocabulary.json").write_text(json.dumps(build_vocabulary(), indent=1))


def _draw_edit_pairs(job: tuple[PairDatasetConfig, int]) -> np.ndarray:
    config, edit_index = job
    portraits = [
        p for pair in config.sample_edit_pairs(edit_index) for p in (pair.before, pair.after)
    ]
    return np.stack(
        [np.asarray(render_portrait(person, scene, config.size)) for person, scene in portraits]
    )
