"""``FolderDataModule``: what data modules over a user's own folders have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning as L
from torch.utils.data import DataLoader, Dataset

from hyperlora.errors import InvalidArgumentError
from hyperlora.training.batches import Batch

Sample = Mapping[str, object]
"""Fields of one sample, as ``collate_fn`` takes them."""


class FolderDataModule(L.LightningDataModule, ABC):
    """A data module whose hyperparameters are a folder, a batch size and a number of workers.

    Subclasses save ``folder``, ``batch_size`` and ``num_workers`` as hyperparameters, and define
    ``make_dataset`` and ``collate_fn``.

    Attributes:
        sample_noun: What a sample is called in error messages, in the plural.
        collate_fn: Samples to a batch.
    """

    sample_noun: ClassVar[str] = "samples"
    collate_fn: ClassVar[Callable[..., Batch]]

    @abstractmethod
    def make_dataset(self, training: bool) -> Dataset[Any]:
        """Make the dataset of training, or else of validation."""

    def train_dataloader(self) -> DataLoader[Sample]:
        """Make the loader of shuffled training batches, without an incomplete last one.

        Raises:
            InvalidArgumentError: The folder has fewer samples than one step takes.
        """
        data, h = self.make_dataset(training=True), self.hparams
        num_samples = len(data)  # type: ignore[arg-type]
        samples_per_step = h["batch_size"] * (self.trainer.world_size if self.trainer else 1)
        if num_samples < samples_per_step:
            raise InvalidArgumentError(
                f"{h['folder']!r} holds {num_samples} {self.sample_noun}, one step takes "
                f"{samples_per_step}: add {self.sample_noun}, or lower batch_size "
                f"({h['batch_size']} per device)"
            )
        return self._make_loader(data, training=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Make the loader of validation batches, always in the same order."""
        return self._make_loader(self.make_dataset(training=False), training=False)

    def _make_loader(self, data: Dataset[Sample], training: bool) -> DataLoader[Sample]:
        has_workers = self.hparams["num_workers"] > 0
        return DataLoader(
            data,
            self.hparams["batch_size"],
            shuffle=training,
            drop_last=training,
            num_workers=self.hparams["num_workers"],
            persistent_workers=has_workers,
            pin_memory=has_workers,
            collate_fn=type(self).collate_fn,
        )
