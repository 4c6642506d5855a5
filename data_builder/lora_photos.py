"""Rows of a build beside the photos they were fitted to: what a diffusion model over LoRAs learns from."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_builder.cutting import centre, cut
from data_builder.plan import read_plan
from data_builder.sources import opened
from hyperlora.data import LoraDataset, to_tensor


class _LorasAndPhotos(Dataset[dict[str, Tensor]]):
    """``rows`` [P] and ``photos`` [views, 3, size, size]: others each time unless ``fixed``."""

    def __init__(self, build: str, split: str, views: int, size: int, fixed: bool) -> None:
        plan = read_plan(Path(build))
        self.source, self.views, self.size, self.fixed = opened(plan.source), views, size, fixed
        self.loras = LoraDataset(build, split)
        planned = {(row.subject, row.view): row for row in plan.rows}
        self.photos = [planned[record.subject, record.view].photos for record in self.loras.records]

    def __len__(self) -> int:
        return len(self.loras)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        photos = self.photos[index]
        order = range(len(photos)) if self.fixed else torch.randperm(len(photos)).tolist()
        chosen = (list(order) * self.views)[: self.views]
        return {"rows": self.loras[index].float(), "photos": torch.stack([self._seen(photos[i]) for i in chosen])}

    def _seen(self, photo: Any) -> Tensor:
        image = self.source.read(photo.ref)[0]
        return to_tensor(cut(image, photo.square or centre(image), self.size), self.size)


class LorasAndPhotos(L.LightningDataModule):
    """``rows`` and ``photos`` of a finished build (``data-builder run``): its split ``train``, and the split
    ``validation`` of the build ``validation``, or of the same one."""

    def __init__(
        self,
        build: str,
        encoder_size: int,
        validation: str | None = None,
        batch_size: int = 32,
        views: int = 1,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        h = self.hparams
        data = _LorasAndPhotos(h["build"], "train", h["views"], h["encoder_size"], fixed=False)
        return DataLoader(data, h["batch_size"], shuffle=True, drop_last=True, num_workers=h["workers"])

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        h = self.hparams
        data = _LorasAndPhotos(h["validation"] or h["build"], "validation", h["views"], h["encoder_size"], fixed=True)
        return DataLoader(data, h["batch_size"], num_workers=h["workers"])
