"""Data modules over rendered images alone, for the image autoencoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from data_builder.datamodules.feature_cache import load_cached_latents
from hyperlora.data.images import array_to_tensor
from hyperlora.training.batches import ImageLatentBatch

_VAL_BATCH_SIZE = 16


class ImageDataset(Dataset[Tensor]):
    """Images [3, size, size] in [0, 1] of a folder of portraits or pairs.

    Args:
        folder: Folder with ``images.npy``.
    """

    def __init__(self, folder: str) -> None:
        self.images = np.load(Path(folder) / "images.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return array_to_tensor(self.images[index][None])[0]


class LatentDataset(Dataset[Tensor]):
    """Scaled latents [c, h, w] of a folder of portraits or pairs.

    Args:
        folder: Folder with ``images.npy``.
        vae: Folder of the autoencoder.
    """

    def __init__(self, folder: str, vae: str) -> None:
        self.latents = load_cached_latents(folder, vae)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.latents[index])).float()


class ImageDataModule(L.LightningDataModule):
    """Load images [n, 3, size, size] in [-1, 1] of one folder.

    Args:
        folder: Folder of rendered training images.
        validation: Folder of rendered validation images.
        batch_size: Images per step.
        num_val_images: Number of validation images, from the first.
        crop_size: Side in pixels of a random crop of every training image; None for whole images.
            A step of the same cost then covers more different images.
    """

    def __init__(
        self,
        folder: str,
        validation: str,
        batch_size: int = 8,
        num_val_images: int = 256,
        crop_size: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Make the loader of shuffled training batches, without an incomplete last one."""
        images = ImageDataset(self.hparams["folder"])
        return DataLoader(images, self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Make the loader of validation batches."""
        images = ImageDataset(self.hparams["validation"])
        num_images = min(self.hparams["num_val_images"], len(images))
        return DataLoader(Subset(images, range(num_images)), _VAL_BATCH_SIZE)

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        """Crop training images at random and map images to [-1, 1].

        Args:
            batch: [n, 3, size, size] in [0, 1].
            dataloader_idx: Not used.

        Returns:
            [n, 3, h, w] in [-1, 1].
        """
        crop_size = self.hparams["crop_size"]
        if crop_size and self.trainer is not None and self.trainer.training:
            batch = _apply_random_crop(batch, crop_size)
        return batch * 2 - 1


def _apply_random_crop(images: Tensor, crop_size: int) -> Tensor:
    """Crop each image [n, c, size, size] at a random corner to [n, c, crop_size, crop_size]."""
    num_offsets = images.shape[-1] - crop_size + 1
    corners = torch.randint(num_offsets, (len(images), 2)).tolist()
    crops = [
        image[:, top : top + crop_size, left : left + crop_size]
        for image, (top, left) in zip(images, corners, strict=True)
    ]
    return torch.stack(crops)


class _ImageLatentSample(TypedDict):
    """Fields as in ``ImageLatentBatch``, without batch axis."""

    images: Tensor
    latents: Tensor


class _ImageLatentDataset(Dataset[_ImageLatentSample]):
    def __init__(self, folder: str, vae: str) -> None:
        self.images, self.latents = ImageDataset(folder), LatentDataset(folder, vae)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _ImageLatentSample:
        return {"images": self.images[index] * 2 - 1, "latents": self.latents[index]}


class ImageLatentDataModule(L.LightningDataModule):
    """Load images of several folders with their latents, as ``ImageLatentBatch``.

    Args:
        folder: Folders of rendered portraits or pairs.
        validation: Folder of rendered validation images.
        vae: Folder of the autoencoder.
        batch_size: Images per step.
        num_val_images: Number of validation images, from the first.
    """

    def __init__(
        self,
        folder: Sequence[str],
        validation: str,
        vae: str,
        batch_size: int = 16,
        num_val_images: int = 256,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[_ImageLatentSample]:
        """Make the loader of shuffled training batches, without an incomplete last one."""
        h = self.hparams
        data: ConcatDataset[_ImageLatentSample] = ConcatDataset(
            [_ImageLatentDataset(folder, h["vae"]) for folder in h["folder"]]
        )
        return DataLoader(
            data,
            h["batch_size"],
            shuffle=True,
            drop_last=True,
            collate_fn=ImageLatentBatch.collate,
        )

    def val_dataloader(self) -> DataLoader[_ImageLatentSample]:
        """Make the loader of validation batches."""
        data = _ImageLatentDataset(self.hparams["validation"], self.hparams["vae"])
        subset = Subset(data, range(min(self.hparams["num_val_images"], len(data))))
        return DataLoader(subset, _VAL_BATCH_SIZE, collate_fn=ImageLatentBatch.collate)
