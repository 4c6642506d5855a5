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
from data_builder.sources.crops import compute_center_box, crop_image
from data_builder.sources.sources import Source, source_from_dict
from data_builder.sources.types import Photo
from hyperlora.data.images import to_tensor
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.pipelines.lora_diffusion import LoraDiffusion
from hyperlora.progress import track

_logger = logging.getLogger(__name__)


class LoraPhotoDataset(Dataset[dict[str, Tensor]]):
    """``latents`` [tokens, width] of a row, and what is seen in ``num_photos`` photos of its subject: ``face`` [views, 1,
    width] and ``image`` [views, n, width]. Other photos each time unless ``deterministic``.

    The frozen parts of ``model`` see every photo and encode every row once, here: drawing, decoding and seeing photos
    costs far more than a training step. Of a photo without a face the face pack says nothing (zeros), and how many
    there are is logged.
    """

    def __init__(
        self,
        build_dir: str,
        split: str,
        model: LoraDiffusion,
        num_photos: int,
        deterministic: bool,
        batch_size: int = 64,
    ) -> None:
        loras = LoraDataset(build_dir, split)
        plan = read_plan(Path(build_dir))
        photos_by_key = {(row.subject, row.repetition): row.photos for row in plan.rows}
        photos = [photos_by_key[record.subject, record.repetition] for record in loras.records]
        self.num_photos, self.deterministic = num_photos, deterministic
        with torch.no_grad():
            self.latents = torch.cat(
                [model.codec.encode_flat(rows.float()) for rows in loras.iter_batches()]
            )
            features = list(
                _encode_photos(photos, source_from_dict(plan.source), model, batch_size)
            )
        faces, images = (torch.cat([part[i] for part in features]) for i in (0, 1))
        counts = [len(some) for some in photos]
        self.faces, self.images = faces.split(counts), images.split(counts)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        count = len(self.images[index])
        order = torch.arange(count) if self.deterministic else torch.randperm(count)
        indices = order.repeat(-(-self.num_photos // count))[: self.num_photos]
        return {
            "latents": self.latents[index],
            "face": self.faces[index][indices],
            "image": self.images[index][indices],
        }


class LoraPhotoDataModule(L.LightningDataModule):
    """``latents``, ``face`` and ``image`` (``LoraPhotoDataset``) of a build (``data-builder run``) or a pack: its split
    ``train``, and the split ``val_build_dir`` of the build ``val_build_dir``, or of the same one. The model that is trained
    looks at the photos, so the data are ready once it is attached."""

    def __init__(
        self,
        build_dir: str,
        val_build_dir: str | None = None,
        batch_size: int = 64,
        num_photos: int = 4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        data = LoraPhotoDataset(
            self.hparams["build_dir"],
            "train",
            self._model,
            self.hparams["num_photos"],
            deterministic=False,
        )
        return DataLoader(data, self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        build_dir = self.hparams["val_build_dir"] or self.hparams["build_dir"]
        return DataLoader(
            LoraPhotoDataset(build_dir, "validation", self._model, 1, deterministic=True),
            self.hparams["batch_size"],
        )

    @property
    def _model(self) -> LoraDiffusion:
        module: Any = self.trainer.lightning_module
        model: LoraDiffusion = module.model
        return model


def _encode_photos(
    photos: list[tuple[Photo, ...]], source: Source, model: LoraDiffusion, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """What ``model`` sees in all photos in order: faces [n, 1, width] and image tokens [n, k, width] at a time."""
    all_photos = [photo for photo_batch in photos for photo in photo_batch]
    image_size, num_without_face = model.photo_size, 0
    batches = [all_photos[i : i + batch_size] for i in range(0, len(all_photos), batch_size)]
    for photo_batch in track(batches, "looking at photos", "photos", len(all_photos), batch_size):
        images = [(source.read_photo(photo.ref)[0], photo) for photo in photo_batch]
        pixels = [
            to_tensor(
                crop_image(image, photo.crop_box or compute_center_box(image), image_size),
                image_size,
            )
            for image, photo in images
        ]
        face, image = model.encode_photos(
            torch.stack(pixels)[:, None].to(model.device), allow_no_face=True
        )
        num_without_face += int((face.tokens == 0).flatten(1).all(1).sum())
        yield face.tokens[:, 0].cpu(), image.tokens[:, 0].cpu()
    if model.face_analyzer is not None and num_without_face:
        _logger.warning(
            "no face was found in %d of %d photos: there the encoder alone is heard",
            num_without_face,
            len(all_photos),
        )
