"""Lightning data modules over drawn portraits."""

from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset

from data_builder.avatars.captions import build_prompt, parse_caption_attributes, sample_caption
from data_builder.avatars.identity import AvatarIdentity, Scene, list_hidden_attributes
from data_builder.avatars.portrait_dataset import PortraitDataset
from data_builder.avatars.vocabulary import GEOMETRY, IDENTITY_ATTRIBUTES, PROMPT_ATTRIBUTES
from data_builder.datamodules.feature_cache import load_cached_latents, load_cached_unet_features
from hyperlora.training.datamodules.collate import collate_subjects
from hyperlora.training.modules.attribute_classifier import IGNORE_INDEX

ATTRIBUTES = {
    k: v for k, v in (IDENTITY_ATTRIBUTES | PROMPT_ATTRIBUTES).items() if k != "facial_hair_color"
}
"""What a reader names; the facial hair's colour is left to the identity space, as most people have none."""


class _ImageDataset(Dataset[Tensor]):
    """Pixels [3, size, size] in [0, 1]."""

    def __init__(self, folder: str) -> None:
        self.images = np.load(Path(folder) / "images.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1).float().div_(255)


class _LatentDataset(Dataset[Tensor]):
    """Scaled latents [c, h, w]."""

    def __init__(self, folder: str, vae: str) -> None:
        self.latents = load_cached_latents(folder, vae)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.latents[index])).float()


class ImageDataModule(L.LightningDataModule):
    """Images alone, [batch, 3, size, size] in [-1, 1]: for the image autoencoder. With ``crop_size``, training batches are
    random squares of that size, so that a step of the same cost sees more different pictures."""

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
        images = _ImageDataset(self.hparams["folder"])
        return DataLoader(images, self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        images = _ImageDataset(self.hparams["validation"])
        return DataLoader(
            Subset(images, range(min(self.hparams["num_val_images"], len(images)))), 16
        )

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        crop_size = self.hparams["crop_size"]
        if crop_size and self.trainer is not None and self.trainer.training:
            num_offsets = batch.shape[-1] - crop_size + 1
            corners = torch.randint(num_offsets, (len(batch), 2)).tolist()
            batch = torch.stack(
                [
                    x[:, i : i + crop_size, j : j + crop_size]
                    for x, (i, j) in zip(batch, corners, strict=True)
                ]
            )
        return batch * 2 - 1


class _ImageLatentDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pictures from -1 to 1, and their latents."""

    def __init__(self, folder: str, vae: str) -> None:
        self.images, self.latents = _ImageDataset(folder), _LatentDataset(folder, vae)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index] * 2 - 1, self.latents[index]


class ImageLatentDataModule(L.LightningDataModule):
    """Pictures [batch, 3, size, size] in [-1, 1] and their scaled latents, of all drawn pictures of some folders
    (portraits or pairs): for the decoder of the image autoencoder ``vae`` alone."""

    def __init__(
        self,
        folder: list[str],
        validation: str,
        vae: str,
        batch_size: int = 16,
        num_val_images: int = 256,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        h = self.hparams
        data: ConcatDataset[tuple[Tensor, Tensor]] = ConcatDataset(
            [_ImageLatentDataset(folder, h["vae"]) for folder in h["folder"]]
        )
        return DataLoader(data, h["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        data = _ImageLatentDataset(self.hparams["validation"], self.hparams["vae"])
        return DataLoader(Subset(data, range(min(self.hparams["num_val_images"], len(data)))), 16)


class _AttributeDataset(Dataset[dict[str, Any]]):
    """Pictures, or with ``vae`` their scaled latents, and all that is known about them."""

    def __init__(self, folder: str, vae: str | None) -> None:
        self.portraits = PortraitDataset(folder)
        self.images = _ImageDataset(folder) if vae is None else _LatentDataset(folder, vae)

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        labels, geometry = self._targets[index]
        subject = index // self.portraits.config.portraits_per_identity
        return {
            "images": self.images[index],
            "labels": labels,
            "geometry": geometry,
            "subject": subject,
        }

    @cached_property
    def _targets(self) -> list[tuple[dict[str, int], Tensor]]:
        portraits = self.portraits
        targets = []
        for index in range(len(self)):
            person, scene = portraits.get_identity(index), portraits.get_scene(index)
            geometry = torch.tensor([getattr(person, k) for k in GEOMETRY])
            targets.append(
                (make_attribute_labels(person, scene), (geometry - 1) * 8)
            )  # about unit variance
        return targets


def make_attribute_labels(
    person: AvatarIdentity, scene: Scene, attributes: Collection[str] = tuple(ATTRIBUTES)
) -> dict[str, int]:
    """The class of every attribute of a portrait; ``HELD_OUT_KINDS_GROUP`` of what it does not show, what has no name, and what is
    not among ``attributes``."""
    values, hidden_attributes = vars(person) | vars(scene), list_hidden_attributes(scene)
    return {
        k: classes.index(values[k])
        if k in attributes and k not in hidden_attributes and values[k] in classes
        else IGNORE_INDEX
        for k, classes in ATTRIBUTES.items()
    }


class _IdentityBatchSampler(Sampler[list[int]]):
    """Batches of whole people: ``identities_per_batch`` persons with two of their portraits each."""

    def __init__(self, portraits: PortraitDataset, identities_per_batch: int) -> None:
        self.config, self.identities_per_batch = portraits.config, identities_per_batch

    def __len__(self) -> int:
        return self.config.num_identities // self.identities_per_batch

    def __iter__(self) -> Iterator[list[int]]:
        for chunk in torch.randperm(self.config.num_identities)[
            : len(self) * self.identities_per_batch
        ].split(self.identities_per_batch):
            indices = (
                torch.rand(len(chunk), self.config.portraits_per_identity).argsort(1)[:, :2]
                + chunk[:, None] * self.config.portraits_per_identity
            )
            yield indices.flatten().tolist()


class AttributeDataModule(L.LightningDataModule):
    """Portraits (with ``vae``, their latents) with all their attributes, two of each person in a batch: for readers."""

    def __init__(
        self, folder: str, validation: str, identities_per_batch: int = 32, vae: str | None = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        data = _AttributeDataset(self.hparams["folder"], self.hparams["vae"])
        return DataLoader(
            data,
            batch_sampler=_IdentityBatchSampler(
                data.portraits, self.hparams["identities_per_batch"]
            ),
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(_AttributeDataset(self.hparams["validation"], self.hparams["vae"]), 64)


class _CaptionedLatentDataset(Dataset[dict[str, Any]]):
    """Latents with captions that name the person's attributes, drawn anew each time, and as ``labels`` the classes of
    those that the caption names."""

    def __init__(self, folder: str, vae: str, proportion_empty_prompts: float) -> None:
        self.portraits, self.proportion_empty_prompts = (
            PortraitDataset(folder),
            proportion_empty_prompts,
        )
        self.latents = _LatentDataset(folder, vae)
        n = len(self.portraits)
        self.identities_and_scenes = [
            (self.portraits.get_identity(i), self.portraits.get_scene(i)) for i in range(n)
        ]

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        text = (
            ""
            if rng.random() < self.proportion_empty_prompts
            else sample_caption(*self.identities_and_scenes[index], rng)
        )
        labels = make_attribute_labels(
            *self.identities_and_scenes[index],
            parse_caption_attributes(*self.identities_and_scenes[index], text),
        )
        return {"latents": self.latents[index], "captions": text, "labels": labels}


class CaptionedLatentDataModule(L.LightningDataModule):
    """Latents and captions: for the base model."""

    def __init__(
        self,
        folder: str,
        validation: str,
        vae: str,
        batch_size: int = 32,
        proportion_empty_prompts: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        data = _CaptionedLatentDataset(
            self.hparams["folder"], self.hparams["vae"], self.hparams["proportion_empty_prompts"]
        )
        return DataLoader(data, self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            _CaptionedLatentDataset(self.hparams["validation"], self.hparams["vae"], 0.0), 64
        )


class _SubjectDataset(Dataset[dict[str, Any]]):
    """One person: ``num_views`` reference portraits (with ``base``, what it sees in them instead), and latents and prompts
    of other portraits of the same person."""

    def __init__(
        self, folder: str, vae: str, num_views: int, num_targets: int, base: str | None
    ) -> None:
        self.images, self.portraits = _ImageDataset(folder), PortraitDataset(folder)
        self.latents = load_cached_latents(folder, vae)
        self.tokens = load_cached_unet_features(folder, vae, base) if base else None
        self.num_views, self.num_targets = num_views, num_targets
        if num_views + num_targets > (
            portraits_per_identity := self.portraits.config.portraits_per_identity
        ):
            raise ValueError(
                f"{num_views} views and {num_targets} targets need as many portraits; {folder} has {portraits_per_identity}"
            )

    def __len__(self) -> int:
        return self.portraits.config.num_identities

    def __getitem__(self, index: int) -> dict[str, Any]:
        portraits = self.portraits
        permutation = (
            torch.randperm(portraits.config.portraits_per_identity)
            + index * portraits.config.portraits_per_identity
        )
        reference_indices = permutation[: self.num_views].tolist()
        target_indices = permutation[self.num_views : self.num_views + self.num_targets].tolist()
        if self.tokens is None:
            inputs = {"photos": torch.stack([self.images[i] for i in reference_indices])}
        else:
            inputs = {"tokens": torch.from_numpy(np.array(self.tokens[reference_indices])).float()}
        return inputs | {
            "latents": torch.stack(
                [torch.from_numpy(np.array(self.latents[i])).float() for i in target_indices]
            ),
            "captions": [build_prompt(portraits.get_scene(i)) for i in target_indices],
            "labels": [
                make_attribute_labels(portraits.get_identity(i), portraits.get_scene(i))
                for i in target_indices
            ],
            "subject": index,
        }


class SubjectDataModule(L.LightningDataModule):
    """Reference photos and other portraits of the same people: for hypernetworks. ``base`` is for those whose encoder
    is the base itself: its tokens are then made once and kept."""

    def __init__(
        self,
        folder: str,
        validation: str,
        vae: str,
        batch_size: int = 16,
        num_views: int = 1,
        num_targets: int = 2,
        base: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            logger=False
        )  # `targets` means another thing in HypernetworkTraining

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        h = self.hparams
        data = _SubjectDataset(h["folder"], h["vae"], h["num_views"], h["num_targets"], h["base"])
        return DataLoader(
            data, h["batch_size"], shuffle=True, drop_last=True, collate_fn=collate_subjects
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        h = self.hparams
        data = _SubjectDataset(h["validation"], h["vae"], h["num_views"], 1, h["base"])
        return DataLoader(data, 50, collate_fn=collate_subjects)
