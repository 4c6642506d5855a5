"""``LoraRowsDataModule``: flat LoRAs of a dataset, for the LoRA autoencoder."""

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from hyperlora.data.lora_dataset import LoraDataset


class LoraRowsDataModule(L.LightningDataModule):
    """Load batches of flat LoRAs [n, P] from a build or a pack.

    Args:
        folder: Dataset whose split ``train`` is trained on.
        validation: Dataset whose split ``validation`` is used; None for the same one.
        batch_size: Per device.
    """

    def __init__(self, folder: str, validation: str | None = None, batch_size: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Make the loader of shuffled training batches, without an incomplete last one."""
        data = LoraDataset(self.hparams["folder"], "train")
        # a dataset smaller than a batch would give none at all
        batch_size = min(self.hparams["batch_size"], len(data))
        return DataLoader(data, batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Make the loader of validation batches."""
        data = LoraDataset(self.hparams["validation"] or self.hparams["folder"], "validation")
        return DataLoader(data, self.hparams["batch_size"])
