"""What data modules over a user's own folders share: how batches are loaded, and what too small a folder is told."""

from collections.abc import Callable
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from hyperlora.errors import InvalidArgumentError


class FolderDataModule(L.LightningDataModule):
    """Subclasses have ``folder``, ``batch_size`` and ``workers`` among their hyperparameters, say what a sample is, and
    make the two datasets. Raises ``InvalidArgumentError`` for fewer samples than one training step takes."""

    sample_noun = "samples"
    collate_fn: Callable[[list[Any]], Any] | None = None

    def make_dataset(self, training: bool) -> Dataset[dict[str, Any]]:
        """Of training, or of validation."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        data, h = self.make_dataset(True), self.hparams
        num_samples = len(data)  # type: ignore[arg-type]
        samples_per_step = h["batch_size"] * (self.trainer.world_size if self.trainer else 1)
        if num_samples < samples_per_step:
            raise InvalidArgumentError(
                f"{h['folder']!r} holds {num_samples} {self.sample_noun}, one step takes {samples_per_step}: add {self.sample_noun}, or lower "
                f"batch_size ({h['batch_size']} per device)"
            )
        return self._make_loader(data, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._make_loader(self.make_dataset(False))

    def _make_loader(
        self, data: Dataset[dict[str, Any]], **loader_kwargs: Any
    ) -> DataLoader[dict[str, Any]]:
        batch_size, num_workers = self.hparams["batch_size"], self.hparams["workers"]
        if num_workers:
            loader_kwargs |= {
                "num_workers": num_workers,
                "persistent_workers": True,
                "pin_memory": True,
            }
        return DataLoader(data, batch_size, collate_fn=type(self).collate_fn, **loader_kwargs)
