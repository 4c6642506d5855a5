"""Drawn before/after pairs on disk: one memory-mapped image array and the configuration that made
it.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_builder.avatars.edits import AvatarPair, sample_pairs
from data_builder.avatars.instructions import build_vocabulary
from data_builder.avatars.portrait_dataset import draw_dataset
from data_builder.avatars.rendering import render_portrait


@dataclass(frozen=True)
class PairDatasetConfig:
    """Which edits are drawn, and on how many identities.

    Attributes:
        split: ``train``, ``validation`` or ``test``.
        num_edits: Number of edits of the split.
        identities_per_edit: Identities that each edit is applied to.
        size: Side of the images in pixels.
        two_edit_fraction: Probability that an edit changes two attributes at once, 0 to 1.
    """

    split: str
    num_edits: int
    identities_per_edit: int = 2
    size: int = 128
    two_edit_fraction: float = 0.2

    def sample_edit_pairs(self, edit_index: int) -> list[AvatarPair]:
        """Sample the pairs of one edit by its number, one per identity."""
        return sample_pairs(
            self.split,
            edit_index,
            self.identities_per_edit,
            two_edit_fraction=self.two_edit_fraction,
        )


class PairDataset:
    """Pairs that ``draw_pairs`` wrote, edit after edit.

    Args:
        folder: Folder of ``plan.json`` and ``images.npy``.

    Attributes:
        config: Configuration they were drawn by.
        images: uint8 [2 * num_edits * identities_per_edit, size, size, 3], memory-mapped; before,
            after, before, ...
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        self.config = PairDatasetConfig(**json.loads((folder / "plan.json").read_text()))
        self.images: np.ndarray = np.load(folder / "images.npy", mmap_mode="r")

    def __len__(self) -> int:
        return self.config.num_edits * self.config.identities_per_edit

    def list_pairs(self) -> list[AvatarPair]:
        """List all pairs; the images of pair i are 2 i and 2 i + 1."""
        return [
            pair
            for edit_index in range(self.config.num_edits)
            for pair in self.config.sample_edit_pairs(edit_index)
        ]


def draw_pairs(folder: Path, config: PairDatasetConfig, num_workers: int | None = None) -> None:
    """Draw a dataset of pairs and the instruction vocabulary of its edits.

    Images that the same configuration drew before are kept.

    Args:
        folder: Folder to write.
        config: Edits, identities and image size.
        num_workers: Number of processes, by default one per core.
    """
    draw_dataset(
        folder,
        asdict(config),
        [(config, edit_index) for edit_index in range(config.num_edits)],
        _draw_edit_pairs,
        images_per_job=2 * config.identities_per_edit,
        size=config.size,
        unit=f"{config.split} edits",
        num_workers=num_workers,
    )
    (folder / "vocabulary.json").write_text(json.dumps(build_vocabulary(), indent=1))


def _draw_edit_pairs(job: tuple[PairDatasetConfig, int]) -> np.ndarray:
    """Draw the pairs of one edit, uint8 [2 * identities, size, size, 3]."""
    config, edit_index = job
    portraits = [
        p for pair in config.sample_edit_pairs(edit_index) for p in (pair.before, pair.after)
    ]
    return np.stack(
        [np.asarray(render_portrait(person, scene, config.size)) for person, scene in portraits]
    )
