"""Data modules over rendered portraits: attributes, captions, and subjects with references."""

from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Final, TypedDict

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data_builder.avatars.captions import build_prompt, parse_caption_attributes, sample_caption
from data_builder.avatars.identity import AvatarIdentity, Scene, list_hidden_attributes
from data_builder.avatars.portrait_dataset import PortraitDataset
from data_builder.avatars.vocabulary import GEOMETRY, IDENTITY_ATTRIBUTES, PROMPT_ATTRIBUTES
from data_builder.datamodules.feature_cache import load_cached_latents, load_cached_unet_features
from data_builder.datamodules.images import ImageDataset, LatentDataset
from hyperlora.training.auxiliary_losses import IGNORE_INDEX
from hyperlora.training.batches import AttributeBatch, CaptionedLatentBatch
from hyperlora.training.datamodules.collate import SubjectSample, collate_subjects

ATTRIBUTES: Final = {
    k: v for k, v in (IDENTITY_ATTRIBUTES | PROMPT_ATTRIBUTES).items() if k != "facial_hair_color"
}
"""Class names by attribute of a classifier. The color of facial hair is left out, since most
identities have none; the identity space covers it."""
_GEOMETRY_SCALE: Final = 8.0
"""Brings the measures of a face, which lie near 1, to about unit variance."""
_PORTRAITS_PER_BATCH: Final = 2
"""Portraits of each identity in a batch of ``AttributeDataModule``."""


def make_attribute_labels(
    person: AvatarIdentity, scene: Scene, attributes: Collection[str] = tuple(ATTRIBUTES)
) -> dict[str, int]:
    """Make the class indices of a portrait.

    Args:
        person: Identity of the portrait.
        scene: Scene of the portrait.
        attributes: Attributes that get a label.

    Returns:
        Class index by attribute; ``IGNORE_INDEX`` where it is not among ``attributes``, is not
        visible, or has a value without a name.
    """
    values, hidden_attributes = vars(person) | vars(scene), list_hidden_attributes(scene)
    return {
        name: classes.index(values[name])
        if name in attributes and name not in hidden_attributes and values[name] in classes
        else IGNORE_INDEX
        for name, classes in ATTRIBUTES.items()
    }


class _AttributeSample(TypedDict):
    """Fields as in ``AttributeBatch``, without batch axis."""

    images: Tensor
    labels: dict[str, int]
    geometry: Tensor
    subject_ids: int


class _AttributeDataset(Dataset[_AttributeSample]):
    """Portraits, or with ``vae`` their scaled latents, with all attributes."""

    def __init__(self, folder: str, vae: str | None) -> None:
        self.portraits = PortraitDataset(folder)
        self.images = ImageDataset(folder) if vae is None else LatentDataset(folder, vae)

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> _AttributeSample:
        labels, geometry = self._targets[index]
        return {
            "images": self.images[index],
            "labels": labels,
            "geometry": geometry,
            "subject_ids": index // self.portraits.config.portraits_per_identity,
        }

    @cached_property
    def _targets(self) -> list[tuple[dict[str, int], Tensor]]:
        targets = []
        for index in range(len(self)):
            person, scene = self.portraits.get_identity(index), self.portraits.get_scene(index)
            geometry = torch.tensor([getattr(person, name) for name in GEOMETRY])
            labels = make_attribute_labels(person, scene)
            targets.append((labels, (geometry - 1) * _GEOMETRY_SCALE))
        return targets


class _IdentityBatchSampler(Sampler[list[int]]):
    """Batches of ``identities_per_batch`` identities with two of their portraits each."""

    def __init__(self, portraits: PortraitDataset, identities_per_batch: int) -> None:
        self.config, self.identities_per_batch = portraits.config, identities_per_batch

    def __len__(self) -> int:
        return self.config.num_identities // self.identities_per_batch

    def __iter__(self) -> Iterator[list[int]]:
        num_portraits = self.config.portraits_per_identity
        num_used = len(self) * self.identities_per_batch
        permutation = torch.randperm(self.config.num_identities)[:num_used]
        for identities in permutation.split(self.identities_per_batch):
            order = torch.rand(len(identities), num_portraits).argsort(1)
            indices = order[:, :_PORTRAITS_PER_BATCH] + identities[:, None] * num_portraits
            yield indices.flatten().tolist()


class AttributeDataModule(L.LightningDataModule):
    """Load portraits with all attributes, two of each identity, as ``AttributeBatch``.

    Args:
        folder: Folder of training portraits.
        validation: Folder of validation portraits.
        identities_per_batch: A batch has twice as many portraits.
        vae: Folder of the autoencoder whose latents replace the images; None for images.
    """

    def __init__(
        self, folder: str, validation: str, identities_per_batch: int = 32, vae: str | None = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[_AttributeSample]:
        """Make the loader of random training batches."""
        data = _AttributeDataset(self.hparams["folder"], self.hparams["vae"])
        sampler = _IdentityBatchSampler(data.portraits, self.hparams["identities_per_batch"])
        return DataLoader(data, batch_sampler=sampler, collate_fn=AttributeBatch.collate)

    def val_dataloader(self) -> DataLoader[_AttributeSample]:
        """Make the loader of validation batches."""
        data = _AttributeDataset(self.hparams["validation"], self.hparams["vae"])
        return DataLoader(data, 64, collate_fn=AttributeBatch.collate)


class _CaptionedLatentSample(TypedDict):
    """Fields as in ``CaptionedLatentBatch``, without batch axis."""

    latents: Tensor
    captions: str
    labels: dict[str, int]


class _CaptionedLatentDataset(Dataset[_CaptionedLatentSample]):
    """Latents with random captions, and labels of the attributes that they name."""

    def __init__(self, folder: str, vae: str, proportion_empty_prompts: float) -> None:
        self.portraits = PortraitDataset(folder)
        self.proportion_empty_prompts = proportion_empty_prompts
        self.latents = LatentDataset(folder, vae)
        self.identities_and_scenes = [
            (self.portraits.get_identity(i), self.portraits.get_scene(i))
            for i in range(len(self.portraits))
        ]

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> _CaptionedLatentSample:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        person, scene = self.identities_and_scenes[index]
        is_empty = rng.random() < self.proportion_empty_prompts
        caption = "" if is_empty else sample_caption(person, scene, rng)
        named_attributes = parse_caption_attributes(person, scene, caption)
        labels = make_attribute_labels(person, scene, named_attributes)
        return {"latents": self.latents[index], "captions": caption, "labels": labels}


class CaptionedLatentDataModule(L.LightningDataModule):
    """Load latents with random captions, as ``CaptionedLatentBatch``.

    Args:
        folder: Folder of training portraits.
        validation: Folder of validation portraits.
        vae: Folder of the autoencoder.
        batch_size: Portraits per step.
        proportion_empty_prompts: Probability of an empty caption in training.
    """

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

    def train_dataloader(self) -> DataLoader[_CaptionedLatentSample]:
        """Make the loader of shuffled training batches, without an incomplete last one."""
        h = self.hparams
        data = _CaptionedLatentDataset(h["folder"], h["vae"], h["proportion_empty_prompts"])
        return DataLoader(
            data,
            h["batch_size"],
            shuffle=True,
            drop_last=True,
            collate_fn=CaptionedLatentBatch.collate,
        )

    def val_dataloader(self) -> DataLoader[_CaptionedLatentSample]:
        """Make the loader of validation batches, without empty captions."""
        data = _CaptionedLatentDataset(self.hparams["validation"], self.hparams["vae"], 0.0)
        return DataLoader(data, 64, collate_fn=CaptionedLatentBatch.collate)


class _SubjectDataset(Dataset[SubjectSample]):
    """References and targets of one identity per sample."""

    def __init__(
        self, folder: str, vae: str, num_views: int, num_targets: int, base: str | None
    ) -> None:
        self.images, self.portraits = ImageDataset(folder), PortraitDataset(folder)
        self.latents = load_cached_latents(folder, vae)
        self.tokens = load_cached_unet_features(folder, vae, base) if base else None
        self.num_views, self.num_targets = num_views, num_targets
        num_portraits = self.portraits.config.portraits_per_identity
        if num_views + num_targets > num_portraits:
            raise ValueError(
                f"{num_views} views and {num_targets} targets need as many portraits of an "
                f"identity; {folder} has {num_portraits}"
            )

    def __len__(self) -> int:
        return self.portraits.config.num_identities

    def __getitem__(self, index: int) -> SubjectSample:
        portraits, num_portraits = self.portraits, self.portraits.config.portraits_per_identity
        order = (torch.randperm(num_portraits) + index * num_portraits).tolist()
        references = order[: self.num_views]
        targets = order[self.num_views : self.num_views + self.num_targets]
        latents = [torch.from_numpy(np.array(self.latents[i])).float() for i in targets]
        sample: SubjectSample = {
            "latents": torch.stack(latents),
            "captions": [build_prompt(portraits.get_scene(i)) for i in targets],
            "labels": [
                make_attribute_labels(portraits.get_identity(i), portraits.get_scene(i))
                for i in targets
            ],
            "subject_id": index,
        }
        if self.tokens is None:
            sample["photos"] = torch.stack([self.images[i] for i in references])
        else:
            sample["tokens"] = torch.from_numpy(np.array(self.tokens[references])).float()
        return sample


class SubjectDataModule(L.LightningDataModule):
    """Load reference portraits and other portraits of the same identities, as ``SubjectBatch``.

    Args:
        folder: Folder of training portraits.
        validation: Folder of validation portraits.
        vae: Folder of the autoencoder of the targets' latents.
        batch_size: Identities per step.
        num_views: Reference portraits of an identity.
        num_targets: Target portraits of an identity; validation has one.
        base: Folder of the base whose UNet is the encoder; its features are then computed once
            and cached, and take the place of the photos. None for another encoder.

    Raises:
        ValueError: An identity has fewer portraits than views and targets.
    """

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
        self.save_hyperparameters(logger=False)

    def train_dataloader(self) -> DataLoader[SubjectSample]:
        """Make the loader of shuffled training batches, without an incomplete last one."""
        h = self.hparams
        data = _SubjectDataset(h["folder"], h["vae"], h["num_views"], h["num_targets"], h["base"])
        return DataLoader(
            data, h["batch_size"], shuffle=True, drop_last=True, collate_fn=collate_subjects
        )

    def val_dataloader(self) -> DataLoader[SubjectSample]:
        """Make the loader of validation batches, with one target of each identity."""
        h = self.hparams
        data = _SubjectDataset(h["validation"], h["vae"], h["num_views"], 1, h["base"])
        return DataLoader(data, 50, collate_fn=collate_subjects)
