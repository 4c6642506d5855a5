"""``EditPairDataModule``: before/after pairs from folders and public datasets."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hyperlora.data.edit_pairs import ImagePair, load_edit_pairs
from hyperlora.data.images import read_image, to_tensor
from hyperlora.errors import InvalidImageError
from hyperlora.training.batches import PairBatch
from hyperlora.training.datamodules.base import FolderDataModule

_MAX_ATTEMPTS = 8
"""Pairs that are tried in turn before an unreadable image is an error."""


class EditPairDataModule(FolderDataModule):
    """Load pairs (A, A') as examples, with the mirrored pair as the edit to make.

    The mirrored target is that of LoRA of Change (2411.19156, §3.3). A pair that cannot be read is
    replaced by the next one, since large datasets hold some.

    Args:
        folder: Folder or Hugging Face id of training pairs (see ``load_edit_pairs``).
        validation: Folder or Hugging Face id of validation pairs.
        resolution: Side of target images in pixels, the base's.
        encoder_size: Side of example images in pixels, the encoder's.
        split: Split of ``folder``, if it is a dataset.
        validation_split: Split of ``validation``, if it is a dataset.
        batch_size: Pairs per device and step.
        num_workers: Processes that load images.

    Raises:
        InvalidImageError: A folder has no pairs.
        InvalidArgumentError: There are fewer pairs than one step takes.
    """

    sample_noun = "pairs"
    collate_fn = PairBatch.collate

    def __init__(
        self,
        folder: str,
        validation: str,
        resolution: int,
        encoder_size: int = 224,
        split: str = "train",
        validation_split: str = "train",
        batch_size: int = 4,
        num_workers: int = 4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)

    def make_dataset(self, training: bool) -> "_EditPairDataset":
        """Make the dataset of training, or else of validation."""
        h = self.hparams
        source, split = (
            (h["folder"], h["split"]) if training else (h["validation"], h["validation_split"])
        )
        return _EditPairDataset(load_edit_pairs(source, split), h["encoder_size"], h["resolution"])


class _PairSample(TypedDict):
    """Fields as in ``PairBatch``, without batch axis."""

    pairs: Tensor
    """[1, 2, 3, encoder_size, encoder_size] in [0, 1]."""
    images: Tensor
    """[2, 3, resolution, resolution] in [0, 1]."""
    instructions: str


class _EditPairDataset(Dataset[_PairSample]):
    def __init__(self, pairs: Sequence[ImagePair], encoder_size: int, resolution: int) -> None:
        self.pairs, self.encoder_size, self.resolution = pairs, encoder_size, resolution

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> _PairSample:
        for attempt in range(_MAX_ATTEMPTS):
            pair = self.pairs[(index + attempt) % len(self)]
            try:
                images = [read_image(side) for side in (pair.before, pair.after)]
            except InvalidImageError as error:
                last_error = error
                continue
            return {
                "pairs": _stack_images(images, self.encoder_size)[None],
                "images": _stack_images(images, self.resolution).flip(-1),
                "instructions": pair.instruction,
            }
        raise last_error


def _stack_images(images: Sequence[Image.Image], size: int) -> Tensor:
    """Resize images and stack them to [n, 3, size, size]."""
    return torch.stack([to_tensor(image, size) for image in images])
