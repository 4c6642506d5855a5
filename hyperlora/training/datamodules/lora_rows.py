import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from hyperlora.data.lora_dataset import LoraDataset


class LoraRowsDataModule(L.LightningDataModule):
    """Rows [batch, P] of a dataset of LoRAs (a build or a pack): its split ``train``, and the split ``validation`` of
    ``validation``, or of the same dataset."""

    def __init__(self, folder: str, validation: str | None = None, batch_size: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Tensor]:
        data = LoraDataset(self.hparams["folder"], "train")
        return DataLoader(data, self.hparams["batch_size"], shuffle=True, drop_last=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Tensor]:
        data = LoraDataset(self.hparams["validation"] or self.hparams["folder"], "validation")
        return DataLoader(data, self.hparams["batch_size"])  # type: ignore[arg-type]
