"""Lightning data modules over drawn portraits."""

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_builder.avatars.portraits import Portraits


class _Images(Dataset[Tensor]):
    def __init__(self, folder: str) -> None:
        self.portraits = Portraits(folder)

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> Tensor:
        pixels = torch.from_numpy(np.array(self.portraits.images[index]))
        return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1)


class PortraitImages(L.LightningDataModule):
    """Images alone: [batch, 3, size, size] in [-1, 1]."""

    def __init__(self, folder: str, validation: str, batch_size: int = 8, validation_images: int = 256) -> None:
        super().__init__()
        self.folder, self.validation = folder, validation
        self.batch_size, self.validation_images = batch_size, validation_images

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(_Images(self.folder), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        images = _Images(self.validation)
        first = torch.utils.data.Subset(images, range(min(self.validation_images, len(images))))
        return DataLoader(first, 16)
