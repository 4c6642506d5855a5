"""Before/after pairs, from folders and public datasets: what a pair network for a real base is trained on."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hyperlora.data.edit_pairs import ImagePair, load_edit_pairs
from hyperlora.data.images import read_image, to_tensor
from hyperlora.errors import InvalidImageError
from hyperlora.training.datamodules.base import FolderDataModule


class EditPairDataModule(FolderDataModule):
    """Pairs (``main_callback.data.edit_pairs.load_edit_pairs``) as ``PairHypernetworkTraining`` takes them: ``pairs`` at ``encoder_size``, and as the
    edit to make ``images`` at ``resolution`` (the base's), the same pair mirrored (2411.19156, §3.3); ``instructions``.

    ``folder`` and ``validation`` are folders or Hugging Face ids, whose ``split`` and ``validation_split`` are taken.
    A pair that cannot be read is left out for another: large sets hold some.
    Raises ``InvalidImageError`` for folders without pairs, ``InvalidArgumentError`` for fewer pairs than one step takes.
    """

    sample_noun = "pairs"

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
        h = self.hparams
        source, split = (
            (h["folder"], h["split"]) if training else (h["validation"], h["validation_split"])
        )
        return _EditPairDataset(load_edit_pairs(source, split), h["encoder_size"], h["resolution"])


class _EditPairDataset(Dataset[dict[str, Any]]):
    def __init__(self, pairs: Any, encoder_size: int, resolution: int) -> None:
        self.pairs, self.encoder_size, self.resolution = pairs, encoder_size, resolution

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for attempt in range(8):
            pair: ImagePair = self.pairs[(index + attempt) % len(self)]
            try:
                images = [read_image(side) for side in (pair.before, pair.after)]
            except InvalidImageError as error:
                last_error = error
                continue
            encoder_pixels, base_pixels = (
                self._stack_images(images, size) for size in (self.encoder_size, self.resolution)
            )
            return {
                "pairs": encoder_pixels[None],
                "images": base_pixels.flip(-1),
                "instructions": pair.instruction,
            }
        raise last_error

    @staticmethod
    def _stack_images(images: list[Any], size: int) -> Tensor:
        return torch.stack([to_tensor(side, size) for side in images])
