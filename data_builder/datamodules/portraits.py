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

from data_builder.avatars.captions import caption, named, prompt
from data_builder.avatars.identity import Identity, Scene, hidden
from data_builder.avatars.portrait_dataset import Portraits
from data_builder.avatars.vocabulary import GEOMETRY, IDENTITY_ATTRIBUTES, PROMPT_ATTRIBUTES
from data_builder.datamodules.feature_cache import latents_of, tokens_of
from hyperlora.training.datamodules.collate import collate_subjects
from hyperlora.training.modules.attribute_classifier import UNSEEN

ATTRIBUTES = {k: v for k, v in (IDENTITY_ATTRIBUTES | PROMPT_ATTRIBUTES).items() if k != "facial_hair_color"}
"""What a reader names; the facial hair's colour is left to the identity space, as most people have none."""


class _Images(Dataset[Tensor]):
    """Pixels [3, size, size] in [0, 1]."""

    def __init__(self, folder: str) -> None:
        self.images = np.load(Path(folder) / "images.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1).float().div_(255)


class _Latents(Dataset[Tensor]):
    """Scaled latents [c, h, w]."""

    def __init__(self, folder: str, vae: str) -> None:
        self.latents = latents_of(folder, vae)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.latents[index])).float()


class PortraitImages(L.LightningDataModule):
    """Images alone, [batch, 3, size, size] in [-1, 1]: for the image autoencoder. With ``crop``, training batches are
    random squares of that size, so that a step of the same cost sees more different pictures."""

    def __init__(
        self, folder: str, validation: str, batch_size: int = 8, validation_images: int = 256, crop: int | None = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Tensor]:
        images = _Images(self.hparams["folder"])
        return DataLoader(images, self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        images = _Images(self.hparams["validation"])
        return DataLoader(Subset(images, range(min(self.hparams["validation_images"], len(images)))), 16)

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        crop = self.hparams["crop"]
        if crop and self.trainer is not None and self.trainer.training:
            limit = batch.shape[-1] - crop + 1
            corners = torch.randint(limit, (len(batch), 2)).tolist()
            batch = torch.stack([x[:, i : i + crop, j : j + crop] for x, (i, j) in zip(batch, corners, strict=True)])
        return batch * 2 - 1


class _Decoded(Dataset[tuple[Tensor, Tensor]]):
    """Pictures from -1 to 1, and their latents."""

    def __init__(self, folder: str, vae: str) -> None:
        self.images, self.latents = _Images(folder), _Latents(folder, vae)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index] * 2 - 1, self.latents[index]


class PicturesAndLatents(L.LightningDataModule):
    """Pictures [batch, 3, size, size] in [-1, 1] and their scaled latents, of all drawn pictures of some folders
    (portraits or pairs): for the decoder of the image autoencoder ``vae`` alone."""

    def __init__(
        self, folder: list[str], validation: str, vae: str, batch_size: int = 16, validation_images: int = 256
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        h = self.hparams
        data: ConcatDataset[tuple[Tensor, Tensor]] = ConcatDataset(
            [_Decoded(folder, h["vae"]) for folder in h["folder"]]
        )
        return DataLoader(data, h["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        data = _Decoded(self.hparams["validation"], self.hparams["vae"])
        return DataLoader(Subset(data, range(min(self.hparams["validation_images"], len(data)))), 16)


class _Labelled(Dataset[dict[str, Any]]):
    """Pictures, or with ``vae`` their scaled latents, and all that is known about them."""

    def __init__(self, folder: str, vae: str | None) -> None:
        self.portraits = Portraits(folder)
        self.images = _Images(folder) if vae is None else _Latents(folder, vae)

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        labels, geometry = self._labels[index]
        subject = index // self.portraits.plan.each
        return {"images": self.images[index], "labels": labels, "geometry": geometry, "subject": subject}

    @cached_property
    def _labels(self) -> list[tuple[dict[str, int], Tensor]]:
        portraits = self.portraits
        out = []
        for index in range(len(self)):
            person, scene = portraits.person(index), portraits.scene(index)
            geometry = torch.tensor([getattr(person, k) for k in GEOMETRY])
            out.append((labels_of(person, scene), (geometry - 1) * 8))  # about unit variance
        return out


def labels_of(person: Identity, scene: Scene, told: Collection[str] = tuple(ATTRIBUTES)) -> dict[str, int]:
    """The class of every attribute of a portrait; ``UNSEEN`` of what it does not show, what has no name, and what is
    not among ``told``."""
    names, unseen = vars(person) | vars(scene), hidden(scene)
    return {
        k: classes.index(names[k]) if k in told and k not in unseen and names[k] in classes else UNSEEN
        for k, classes in ATTRIBUTES.items()
    }


class _PeopleTogether(Sampler[list[int]]):
    """Batches of whole people: ``people`` persons with two of their portraits each."""

    def __init__(self, portraits: Portraits, people: int) -> None:
        self.plan, self.people = portraits.plan, people

    def __len__(self) -> int:
        return self.plan.people // self.people

    def __iter__(self) -> Iterator[list[int]]:
        for chunk in torch.randperm(self.plan.people)[: len(self) * self.people].split(self.people):
            pairs = torch.rand(len(chunk), self.plan.each).argsort(1)[:, :2] + chunk[:, None] * self.plan.each
            yield pairs.flatten().tolist()


class LabelledPortraits(L.LightningDataModule):
    """Portraits (with ``vae``, their latents) with all their attributes, two of each person in a batch: for readers."""

    def __init__(self, folder: str, validation: str, people_per_batch: int = 32, vae: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        data = _Labelled(self.hparams["folder"], self.hparams["vae"])
        return DataLoader(data, batch_sampler=_PeopleTogether(data.portraits, self.hparams["people_per_batch"]))

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(_Labelled(self.hparams["validation"], self.hparams["vae"]), 64)


class _Captioned(Dataset[dict[str, Any]]):
    """Latents with captions that name the person's attributes, drawn anew each time, and as ``labels`` the classes of
    those that the caption names."""

    def __init__(self, folder: str, vae: str, empty: float) -> None:
        self.portraits, self.empty = Portraits(folder), empty
        self.latents = _Latents(folder, vae)
        n = len(self.portraits)
        self.who = [(self.portraits.person(i), self.portraits.scene(i)) for i in range(n)]

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        text = "" if rng.random() < self.empty else caption(*self.who[index], rng)
        labels = labels_of(*self.who[index], named(*self.who[index], text))
        return {"latents": self.latents[index], "captions": text, "labels": labels}


class CaptionedLatents(L.LightningDataModule):
    """Latents and captions: for the base model."""

    def __init__(self, folder: str, validation: str, vae: str, batch_size: int = 32, empty: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        data = _Captioned(self.hparams["folder"], self.hparams["vae"], self.hparams["empty"])
        return DataLoader(data, self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(_Captioned(self.hparams["validation"], self.hparams["vae"], 0.0), 64)


class _Subjects(Dataset[dict[str, Any]]):
    """One person: ``views`` reference portraits (with ``base``, what it sees in them instead), and latents and prompts
    of other portraits of the same person."""

    def __init__(self, folder: str, vae: str, views: int, targets: int, base: str | None) -> None:
        self.images, self.portraits = _Images(folder), Portraits(folder)
        self.latents = latents_of(folder, vae)
        self.tokens = tokens_of(folder, vae, base) if base else None
        self.views, self.targets = views, targets
        if views + targets > (each := self.portraits.plan.each):
            raise ValueError(f"{views} views and {targets} targets need as many portraits; {folder} has {each}")

    def __len__(self) -> int:
        return self.portraits.plan.people

    def __getitem__(self, person: int) -> dict[str, Any]:
        portraits = self.portraits
        order = torch.randperm(portraits.plan.each) + person * portraits.plan.each
        references = order[: self.views].tolist()
        targets = order[self.views : self.views + self.targets].tolist()
        if self.tokens is None:
            seen = {"photos": torch.stack([self.images[i] for i in references])}
        else:
            seen = {"tokens": torch.from_numpy(np.array(self.tokens[references])).float()}
        return seen | {
            "latents": torch.stack([torch.from_numpy(np.array(self.latents[i])).float() for i in targets]),
            "captions": [prompt(portraits.scene(i)) for i in targets],
            "labels": [labels_of(portraits.person(i), portraits.scene(i)) for i in targets],
            "subject": person,
        }


class PhotoToTargets(L.LightningDataModule):
    """Reference photos and other portraits of the same people: for hypernetworks. ``base`` is for those whose encoder
    is the base itself: its tokens are then made once and kept."""

    def __init__(
        self,
        folder: str,
        validation: str,
        vae: str,
        batch_size: int = 16,
        views: int = 1,
        targets: int = 2,
        base: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # `targets` means another thing in HypernetworkTraining

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        h = self.hparams
        data = _Subjects(h["folder"], h["vae"], h["views"], h["targets"], h["base"])
        return DataLoader(data, h["batch_size"], shuffle=True, drop_last=True, collate_fn=collate_subjects)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        h = self.hparams
        data = _Subjects(h["validation"], h["vae"], h["views"], 1, h["base"])
        return DataLoader(data, 50, collate_fn=collate_subjects)
