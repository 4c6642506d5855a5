"""Lightning data modules over drawn before/after pairs."""

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from data_builder.avatars.edits import (
    HELD_OUT_COMBINATIONS,
    HELD_OUT_KINDS,
    AttributeEdit,
    AvatarPair,
    compose_instruction,
    compose_instruction_with_undo,
    format_instruction,
)
from data_builder.avatars.edits import sample_edit as drawn_change
from data_builder.avatars.pair_dataset import PairDataset
from data_builder.datamodules.feature_cache import load_cached_features, load_cached_latents
from data_builder.datamodules.portraits import ATTRIBUTES, make_attribute_labels


class _EditLatentDataset(Dataset[dict[str, Any]]):
    """Latents of pairs in both directions, each with its instruction: item 2 i forward, 2 i + 1 backward. Several
    changes are asked for as a sum or, a quarter of the time, as one sentence, a colour that has a name by it or, half
    of the time, as a mixture. With probability ``undo_prob`` the base is told what a LoRA says, three times in ten the
    negative of the way back; what is taken away is what was there or, three times in ten, what someone else had."""

    def __init__(
        self, folder: str, vae: str, identity_edit_prob: float, undo_prob: float = 0.0
    ) -> None:
        self.pairs, self.identity_edit_prob, self.undo_prob = (
            PairDataset(folder).list_pairs(),
            identity_edit_prob,
            undo_prob,
        )
        self.latents = load_cached_latents(folder, vae)

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair_index, is_reverse = divmod(index, 2)
        edits = [c.reverse() if is_reverse else c for c in self.pairs[pair_index].edits]
        before, after = (
            index,
            index ^ 1,
        )  # picture 2 i is before, 2 i + 1 after: going back they change places
        prompt = self._sample_instruction(edits)
        if float(torch.rand(())) < self.identity_edit_prob:
            prompt, after = "", before
        return {
            "before": self._load_latent(before),
            "after": self._load_latent(after),
            "instructions": prompt,
            "labels": _make_side_labels(self.pairs[pair_index], after % 2),
        }

    def _sample_instruction(self, edits: list[AttributeEdit]) -> str:
        values = [(c.attribute, c.after) for c in edits]
        use_mixture = _sample_bernoulli(0.5)
        if _sample_bernoulli(self.undo_prob):
            from_other_identity = _sample_bernoulli(0.3)
            previous_values = [
                (c.attribute, _sample_other_value(c) if from_other_identity else c.before)
                for c in edits
            ]
            return (
                compose_instruction_with_undo(previous_values, values, use_mixture, undo=True)
                if _sample_bernoulli(0.3)
                else compose_instruction_with_undo(values, previous_values, use_mixture)
            )
        if len(values) > 1 and _sample_bernoulli(0.25):
            return ", ".join(format_instruction(*value) for value in values)
        return compose_instruction(values, use_mixture)

    def _load_latent(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.latents[index])).float()


def _sample_other_value(edit: AttributeEdit) -> str:
    """What someone else may have had before this change; mostly the same of what is there or not."""
    value = drawn_change(np.random.default_rng(int(torch.randint(2**31, ()))), edit.kind).before
    return edit.before if value == edit.after else value


def _sample_bernoulli(probability: float) -> bool:
    return float(torch.rand(())) < probability


class EditLatentDataModule(L.LightningDataModule):
    """``before``, ``after`` and ``instructions``, from one folder or several: for the edit base. With probability
    ``nothing`` the instruction is empty and the picture stays as it is, and with ``undo_prob`` it is what a LoRA of the
    edit, or the negative of one, says (``data_builder.draw_portraits.edits.compose_instruction_with_undo``)."""

    def __init__(
        self,
        folder: str | list[str],
        validation: str,
        vae: str,
        batch_size: int = 32,
        identity_edit_prob: float = 0.1,
        undo_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        h = self.hparams
        data: ConcatDataset[dict[str, Any]] = ConcatDataset(
            [
                _EditLatentDataset(folder, h["vae"], h["identity_edit_prob"], h["undo_prob"])
                for folder in _list_folders(h["folder"])
            ]
        )
        return DataLoader(data, h["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            _EditLatentDataset(self.hparams["validation"], self.hparams["vae"], 0.0), 64
        )


class _PairTransferDataset(Dataset[dict[str, Any]]):
    """A pair as pictures, and the same change elsewhere: on another person as latents, or on the pictures mirrored."""

    def __init__(
        self,
        folder: str,
        vae: str | None,
        target_pair: str,
        identity_edit_prob: float,
        encoder: str | None = None,
        encoder_options: dict[str, Any] | None = None,
    ) -> None:
        self.dataset, self.target_pair, self.identity_edit_prob = (
            PairDataset(folder),
            target_pair,
            identity_edit_prob,
        )
        self.features = load_cached_features(folder, encoder, encoder_options) if encoder else None
        self.pairs, self.identities_per_edit = (
            self.dataset.list_pairs(),
            self.dataset.config.identities_per_edit,
        )
        if target_pair == "other" and self.identities_per_edit < 2:
            raise ValueError(
                f"the same change on another person needs 2 people per change, {folder} has {self.identities_per_edit}"
            )
        self.latents = load_cached_latents(folder, vae) if vae else None
        self.train_indices = [i for i, pair in enumerate(self.pairs) if _is_training_pair(pair)]

    def __len__(self) -> int:
        return len(self.train_indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair_index = self.train_indices[index]
        first_index = pair_index - pair_index % self.identities_per_edit
        other_indices = [
            i for i in range(first_index, first_index + self.identities_per_edit) if i != pair_index
        ]
        is_identity_edit = float(torch.rand(())) < self.identity_edit_prob
        target_index = (
            pair_index
            if self.target_pair == "mirrored"
            else other_indices[int(torch.randint(len(other_indices), ()))]
        )
        view_indices = (
            [pair_index]
            if self.target_pair == "mirrored"
            else [pair_index, *(i for i in other_indices if i != target_index)]
        )
        input_key = "pairs" if self.features is None else "tokens"
        item: dict[str, Any] = {
            input_key: torch.stack([self._load_input(i, is_identity_edit) for i in view_indices]),
            "instructions": ""
            if is_identity_edit
            else self._make_instruction(target_index, "after"),
            "undoing": "" if is_identity_edit else self._make_instruction(target_index, "before"),
        }
        if self.target_pair == "mirrored":
            return item | {"images": self._load_images(target_index, is_identity_edit).flip(-1)}
        if self.latents is None:
            return item
        before, after = (
            torch.from_numpy(np.array(self.latents[2 * target_index + i])).float() for i in (0, 1)
        )
        item["labels"] = [
            _make_side_labels(self.pairs[target_index], 0 if is_identity_edit else side)
            for side in (0, 1)
        ]
        return item | {"before": before, "after": before if is_identity_edit else after}

    def _make_instruction(self, pair_index: int, side: str) -> str:
        """What asks for a side (``before`` or ``after``) of a pair."""
        return compose_instruction(
            [(c.attribute, getattr(c, side)) for c in self.pairs[pair_index].edits]
        )

    def _load_input(self, pair_index: int, is_identity_edit: bool) -> Tensor:
        if self.features is None:
            return self._load_images(pair_index, is_identity_edit)
        tokens = torch.from_numpy(np.array(self.features[2 * pair_index : 2 * pair_index + 2]))
        return tokens[[0, 0]] if is_identity_edit else tokens

    def _load_images(self, pair_index: int, is_identity_edit: bool) -> Tensor:
        pixels = torch.from_numpy(
            np.array(self.dataset.images[2 * pair_index : 2 * pair_index + 2])
        ).permute(0, 3, 1, 2)
        pixels = pixels.float().div_(255)
        return pixels[[0, 0]] if is_identity_edit else pixels


def _list_folders(folder: str | list[str]) -> list[str]:
    return [folder] if isinstance(folder, str) else folder


def _make_side_labels(pair: AvatarPair, side: int) -> dict[str, int]:
    """The classes of what a side (0 before, 1 after) shows: nothing under a light that changes all colours."""
    person, scene = pair.after if side else pair.before
    return make_attribute_labels(person, scene, () if scene.tone != "plain" else tuple(ATTRIBUTES))


def _is_training_pair(pair: AvatarPair) -> bool:
    attributes = frozenset(change.attribute for change in pair.edits)
    return not attributes & set(HELD_OUT_KINDS) and attributes not in HELD_OUT_COMBINATIONS


class PairDataModule(L.LightningDataModule):
    """What ``PairHypernetworkTraining`` takes, of kinds a network may be trained on, from one folder or several (of as many
    people). ``target_pair``: ``other``, the same change on another person (its further people are views), or ``mirrored``,
    the same pictures mirrored, which any pair allows. With probability ``nothing`` neither side changes. ``encoder``
    (with ``encoder_options``), if the network's is frozen, looks at all pictures once and for all. Without ``vae``
    there are no latents: for learning words alone."""

    def __init__(
        self,
        folder: str | list[str],
        validation: str,
        vae: str | None,
        batch_size: int = 16,
        target_pair: str = "other",
        identity_edit_prob: float = 0.03,
        encoder: str | None = None,
        encoder_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        h = self.hparams
        dataset_args = (
            h["vae"],
            h["target_pair"],
            h["identity_edit_prob"],
            h["encoder"],
            h["encoder_options"],
        )
        data: ConcatDataset[dict[str, Any]] = ConcatDataset(
            [_PairTransferDataset(folder, *dataset_args) for folder in _list_folders(h["folder"])]
        )
        return DataLoader(data, h["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        h = self.hparams
        data = _PairTransferDataset(
            h["validation"], h["vae"], "other", 0.0, h["encoder"], h["encoder_options"]
        )
        return DataLoader(data, 50)
