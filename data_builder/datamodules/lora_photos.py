"""Rows of a build beside the photos they were fitted to: what a diffusion model over LoRAs learns from."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_builder.build.plan import read_plan
from data_builder.sources.crops import centre, cut
from data_builder.sources.sources import Source, opened
from data_builder.sources.types import Photo
from hyperlora.data.images import to_tensor
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.pipelines.lora_diffusion import LoraDiffusion
from hyperlora.progress import track

_log = logging.getLogger(__name__)


class SeenLoras(Dataset[dict[str, Tensor]]):
    """``latents`` [tokens, width] of a row, and what is seen in ``views`` photos of its subject: ``face`` [views, 1,
    width] and ``image`` [views, n, width]. Other photos each time unless ``fixed``.

    The frozen parts of ``model`` see every photo and encode every row once, here: drawing, decoding and seeing photos
    costs far more than a training step. Of a photo without a face the face pack says nothing (zeros), and how many
    there are is logged.
    """

    def __init__(self, build: str, split: str, model: LoraDiffusion, views: int, fixed: bool, batch: int = 64) -> None:
        loras = LoraDataset(build, split)
        plan = read_plan(Path(build))
        planned = {(row.subject, row.view): row.photos for row in plan.rows}
        photos = [planned[record.subject, record.view] for record in loras.records]
        self.views, self.fixed = views, fixed
        with torch.no_grad():
            self.latents = torch.cat([model.codec.encode_rows(rows.float()) for rows in loras.batches()])
            seen = list(_seen(photos, opened(plan.source), model, batch))
        faces, images = (torch.cat([part[i] for part in seen]) for i in (0, 1))
        counts = [len(some) for some in photos]
        self.faces, self.images = faces.split(counts), images.split(counts)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        count = len(self.images[index])
        order = torch.arange(count) if self.fixed else torch.randperm(count)
        chosen = order.repeat(-(-self.views // count))[: self.views]
        return {"latents": self.latents[index], "face": self.faces[index][chosen], "image": self.images[index][chosen]}


class LorasAndPhotos(L.LightningDataModule):
    """``latents``, ``face`` and ``image`` (``SeenLoras``) of a build (``data-builder run``) or a pack: its split
    ``train``, and the split ``validation`` of the build ``validation``, or of the same one. The model that is trained
    looks at the photos, so the data are ready once it is attached."""

    def __init__(self, build: str, validation: str | None = None, batch_size: int = 64, views: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        data = SeenLoras(self.hparams["build"], "train", self._model, self.hparams["views"], fixed=False)
        return DataLoader(data, self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        where = self.hparams["validation"] or self.hparams["build"]
        return DataLoader(SeenLoras(where, "validation", self._model, 1, fixed=True), self.hparams["batch_size"])

    @property
    def _model(self) -> LoraDiffusion:
        module: Any = self.trainer.lightning_module
        model: LoraDiffusion = module.model
        return model


def _seen(
    photos: list[tuple[Photo, ...]], source: Source, model: LoraDiffusion, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """What ``model`` sees in all photos in order: faces [n, 1, width] and image tokens [n, k, width] at a time."""
    flat = [photo for some in photos for photo in some]
    size, faceless = model.photo_size, 0
    batches = [flat[i : i + batch] for i in range(0, len(flat), batch)]
    for some in track(batches, "looking at photos", "photos", len(flat), batch):
        images = [(source.read(photo.ref)[0], photo) for photo in some]
        pixels = [to_tensor(cut(image, photo.square or centre(image), size), size) for image, photo in images]
        face, image = model.features(torch.stack(pixels)[:, None].to(model.device), faceless=True)
        faceless += int((face.tokens == 0).flatten(1).all(1).sum())
        yield face.tokens[:, 0].cpu(), image.tokens[:, 0].cpu()
    if model.face is not None and faceless:
        _log.warning("no face was found in %d of %d photos: there the encoder alone is heard", faceless, len(flat))
