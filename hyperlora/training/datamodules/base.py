"""What data modules over a user's own folders share: how batches are loaded, and what too small a folder is told."""

from collections.abc import Callable
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from hyperlora.errors import BadRequest


class FolderData(L.LightningDataModule):
    """Subclasses have ``folder``, ``batch_size`` and ``workers`` among their hyperparameters, say what a sample is, and
    make the two datasets. Raises ``BadRequest`` for fewer samples than one training step takes."""

    noun = "samples"
    collate: Callable[[list[Any]], Any] | None = None

    def dataset(self, training: bool) -> Dataset[dict[str, Any]]:
        """Of training, or of validation."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        data, h = self.dataset(True), self.hparams
        found = len(data)  # type: ignore[arg-type]
        together = h["batch_size"] * (self.trainer.world_size if self.trainer else 1)
        if found < together:
            raise BadRequest(
                f"{h['folder']!r} holds {found} {self.noun}, one step takes {together}: add {self.noun}, or lower "
                f"batch_size ({h['batch_size']} per device)"
            )
        return self._loader(data, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.dataset(False))

    def _loader(self, data: Dataset[dict[str, Any]], **options: Any) -> DataLoader[dict[str, Any]]:
        size, workers = self.hparams["batch_size"], self.hparams["workers"]
        if workers:
            options |= {"num_workers": workers, "persistent_workers": True, "pin_memory": True}
        return DataLoader(data, size, collate_fn=type(self).collate, **options)
