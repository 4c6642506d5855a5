"""Data module over LoRAs with the photos they were fitted to, for a diffusion over LoRAs."""

import logging
import zlib
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypedDict

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_builder.build.plan import read_plan
from data_builder.sources.crops import compute_center_box, crop_image
from data_builder.sources.sources import Source, source_from_dict
from data_builder.sources.types import Photo
from hyperlora.data.images import to_tensor
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.errors import InvalidArgumentError, InvalidImageError
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.pipelines.lora_diffusion import LoraDiffusion
from hyperlora.progress import track
from hyperlora.training.augmentation import occlude_image
from hyperlora.training.batches import LoraPhotoBatch
from hyperlora.training.modules.lora_diffusion import LoraDiffusionTraining

_logger = logging.getLogger(__name__)


class LoraPhotoSample(TypedDict):
    """Fields as in ``LoraPhotoBatch``, without batch axis."""

    latents: Tensor
    face_features: Tensor
    image_features: Tensor


class LoraPhotoDataset(Dataset[LoraPhotoSample]):
    """Latents of LoRAs with features of photos of their subjects.

    The frozen parts of the model encode every photo and every LoRA once, in the constructor: this
    costs far more than a training step. A photo without a face has face features of 0; how many
    there are is logged.

    Args:
        build_dir: Folder of a build or a pack, with its plan.
        split: ``train`` or ``validation``.
        model: Model whose codec, encoder and face pack are used.
        num_views: Photos per sample, repeated in turn where a subject has fewer.
        deterministic: Whether they are always the first ones, or else random.
        num_occlusions: Copies of each photo with a random part covered, which are views too.
        batch_size: Photos that are encoded together.
    """

    def __init__(
        self,
        build_dir: str,
        split: str,
        model: LoraDiffusion,
        num_views: int,
        deterministic: bool,
        num_occlusions: int = 0,
        batch_size: int = 64,
    ) -> None:
        loras, plan = LoraDataset(build_dir, split), read_plan(Path(build_dir))
        if not len(loras):
            raise InvalidArgumentError(
                f"{build_dir!r} holds no LoRA of the split {split!r}: plan it with --val-fraction "
                "between 0 and 1, or name another build"
            )
        loras.layout.check_compatible(model.layout)
        photos_by_key = {(row.subject, row.repetition): row.photos for row in plan.rows}
        photos = [photos_by_key[record.subject, record.repetition] for record in loras.records]
        photo_views = [
            _PhotoView(photo, occlusion)
            for photos_of_lora in photos
            for occlusion in range(num_occlusions + 1)
            for photo in photos_of_lora
        ]
        self.loras, self.num_views, self.deterministic = loras, num_views, deterministic
        self.latents = _encode_loras(loras, model.codec)  # [num_loras, tokens, width]
        with torch.no_grad():
            source = source_from_dict(plan.source)
            features = list(_encode_photos(photo_views, source, model, batch_size))
        faces, images = (torch.cat(parts) for parts in zip(*features, strict=True))
        counts = [len(photos_of_lora) * (num_occlusions + 1) for photos_of_lora in photos]
        self.faces, self.images = faces.split(counts), images.split(counts)

    def with_loras(self, loras: LoraDataset, codec: LoraCodec) -> Self:
        """Return the same photos with other LoRAs of the same subjects, or another codec.

        Args:
            loras: As many LoRAs, in the same order.
            codec: Encodes them.

        Raises:
            InvalidArgumentError: The subjects differ.
        """
        subjects, other_subjects = (
            [record.subject for record in dataset.records] for dataset in (self.loras, loras)
        )
        if subjects != other_subjects:
            raise InvalidArgumentError(
                f"{str(loras.folder)!r} holds LoRAs of other subjects than "
                f"{str(self.loras.folder)!r}, the same in the same order are expected"
            )
        dataset = copy(self)
        dataset.loras, dataset.latents = loras, _encode_loras(loras, codec)
        return dataset

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> LoraPhotoSample:
        count = len(self.images[index])
        order = torch.arange(count) if self.deterministic else torch.randperm(count)
        num_repeats = -(-self.num_views // count)  # rounded up
        views = order.repeat(num_repeats)[: self.num_views]
        return {
            "latents": self.latents[index],
            "face_features": self.faces[index][views],
            "image_features": self.images[index][views],
        }


class LoraPhotoDataModule(L.LightningDataModule):
    """Load LoRAs of a build with features of photos, as ``LoraPhotoBatch``.

    The model in training encodes the photos, so it must be a ``LoraDiffusionTraining``.

    Args:
        build_dir: Folder of a build or a pack, whose split ``train`` is trained on.
        val_build_dir: Folder of a build whose split ``validation`` is used; None for the same.
        batch_size: LoRAs per step.
        num_views: Photos of a subject in training; validation has one.
        num_occlusions: Copies of each training photo with a random part covered.
    """

    def __init__(
        self,
        build_dir: str,
        val_build_dir: str | None = None,
        batch_size: int = 64,
        num_views: int = 4,
        num_occlusions: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[LoraPhotoSample]:
        """Encode all photos; make the loader of shuffled batches, all of the same size."""
        h = self.hparams
        data = LoraPhotoDataset(
            h["build_dir"],
            "train",
            self._model,
            h["num_views"],
            deterministic=False,
            num_occlusions=h["num_occlusions"],
        )
        # a dataset smaller than a batch would give none at all
        batch_size = min(h["batch_size"], len(data))
        return DataLoader(
            data, batch_size, shuffle=True, drop_last=True, collate_fn=LoraPhotoBatch.collate
        )

    def val_dataloader(self) -> DataLoader[LoraPhotoSample]:
        """Encode all photos; make the loader of validation batches, with one photo each."""
        h = self.hparams
        build_dir = h["val_build_dir"] or h["build_dir"]
        data = LoraPhotoDataset(build_dir, "validation", self._model, 1, deterministic=True)
        return DataLoader(data, h["batch_size"], collate_fn=LoraPhotoBatch.collate)

    @property
    def _model(self) -> LoraDiffusion:
        module: LoraDiffusionTraining = self.trainer.lightning_module
        return module.model


@dataclass(frozen=True)
class _PhotoView:
    """A photo as it is (0), or with one of its random parts covered (1, 2, ...)."""

    photo: Photo
    occlusion: int


@torch.no_grad()
def _encode_loras(loras: LoraDataset, codec: LoraCodec) -> Tensor:
    """Encode all LoRAs as latents [num_loras, tokens, width]."""
    return torch.cat([codec.encode_flat(rows.float()) for rows in loras.iter_batches()])


def _encode_photos(
    photo_views: Sequence[_PhotoView], source: Source, model: LoraDiffusion, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Encode photos in order: features of faces [n, 1, width] and of images [n, k, width]."""
    num_without_face = 0
    batches = [photo_views[i : i + batch_size] for i in range(0, len(photo_views), batch_size)]
    for batch in track(batches, "encoding photos", "photos", len(photo_views), batch_size):
        images = torch.stack([_read_photo(view, source, model.photo_size) for view in batch])
        features = model.encode_photos(images[:, None].to(model.device), allow_no_face=True)
        assert features.face is not None
        face_tokens, image_tokens = features.face.tokens[:, 0], features.image.tokens[:, 0]
        num_without_face += int((face_tokens == 0).flatten(1).all(1).sum())
        yield face_tokens.cpu(), image_tokens.cpu()
    if model.face_analyzer is None or not num_without_face:
        return
    if num_without_face == len(photo_views):
        raise InvalidImageError(
            f"the face pack {model.face_analyzer.pack!r} finds no face in any of "
            f"{len(photo_views)} photos: use another --model.init_args.face_pack, or null for none"
        )
    _logger.warning(
        "no face was found in %d of %d photos: only their image features are used",
        num_without_face,
        len(photo_views),
    )


def _read_photo(view: _PhotoView, source: Source, size: int) -> Tensor:
    """Read a photo and crop it to [3, size, size] in [0, 1]."""
    photo = view.photo
    image, _ = source.read_photo(photo.ref)
    crop_box = photo.crop_box or compute_center_box(image)
    pixels = to_tensor(crop_image(image, crop_box, size), size)
    if not view.occlusion:
        return pixels
    seed = zlib.crc32(f"{photo.ref}/{view.occlusion}".encode())
    return occlude_image(pixels, np.random.default_rng(seed))
