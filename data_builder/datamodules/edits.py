"""Lightning data modules over drawn before/after pairs."""

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from data_builder.avatars.edits import UNSEEN_KINDS, UNSEEN_TOGETHER, Change, Pair, asked, instruction, undoable
from data_builder.avatars.edits import change as drawn_change
from data_builder.avatars.pair_dataset import DrawnPairs
from data_builder.datamodules.feature_cache import features_of, latents_of
from data_builder.datamodules.portraits import ATTRIBUTES, labels_of


class _Edits(Dataset[dict[str, Any]]):
    """Latents of pairs in both directions, each with its instruction: item 2 i forward, 2 i + 1 backward. Several
    changes are asked for as a sum or, a quarter of the time, as one sentence, a colour that has a name by it or, half
    of the time, as a mixture. With probability ``undoing`` the base is told what a LoRA says, three times in ten the
    negative of the way back; what is taken away is what was there or, three times in ten, what someone else had."""

    def __init__(self, folder: str, vae: str, nothing: float, undoing: float = 0.0) -> None:
        self.pairs, self.nothing, self.undoing = DrawnPairs(folder).pairs(), nothing, undoing
        self.latents = latents_of(folder, vae)

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, backward = divmod(index, 2)
        changes = [c.reversed() if backward else c for c in self.pairs[number].changes]
        before, after = index, index ^ 1  # picture 2 i is before, 2 i + 1 after: going back they change places
        words = self._words(changes)
        if float(torch.rand(())) < self.nothing:
            words, after = "", before
        return {
            "before": self._latent(before), "after": self._latent(after), "instructions": words,
            "labels": _labels(self.pairs[number], after % 2),
        }  # fmt: skip

    def _words(self, changes: list[Change]) -> str:
        values = [(c.attribute, c.after) for c in changes]
        mixed = _chance(0.5)
        if _chance(self.undoing):
            elsewhere = _chance(0.3)
            left = [(c.attribute, _another(c) if elsewhere else c.before) for c in changes]
            return undoable(left, values, mixed, undo=True) if _chance(0.3) else undoable(values, left, mixed)
        if len(values) > 1 and _chance(0.25):
            return ", ".join(instruction(*value) for value in values)
        return asked(values, mixed)

    def _latent(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.latents[index])).float()


def _another(change: Change) -> str:
    """What someone else may have had before this change; mostly the same of what is there or not."""
    before = drawn_change(np.random.default_rng(int(torch.randint(2**31, ()))), change.kind).before
    return change.before if before == change.after else before


def _chance(probability: float) -> bool:
    return float(torch.rand(())) < probability


class EditLatents(L.LightningDataModule):
    """``before``, ``after`` and ``instructions``, from one folder or several: for the edit base. With probability
    ``nothing`` the instruction is empty and the picture stays as it is, and with ``undoing`` it is what a LoRA of the
    edit, or the negative of one, says (``data_builder.avatars.edits.undoable``)."""

    def __init__(
        self,
        folder: str | list[str],
        validation: str,
        vae: str,
        batch_size: int = 32,
        nothing: float = 0.1,
        undoing: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        h = self.hparams
        data: ConcatDataset[dict[str, Any]] = ConcatDataset(
            [_Edits(folder, h["vae"], h["nothing"], h["undoing"]) for folder in _folders(h["folder"])]
        )
        return DataLoader(data, h["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(_Edits(self.hparams["validation"], self.hparams["vae"], 0.0), 64)


class _Shown(Dataset[dict[str, Any]]):
    """A pair as pictures, and the same change elsewhere: on another person as latents, or on the pictures mirrored."""

    def __init__(
        self, folder: str, vae: str | None, target: str, nothing: float,
        encoder: str | None = None, encoder_options: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.drawn, self.target, self.nothing = DrawnPairs(folder), target, nothing
        self.features = features_of(folder, encoder, encoder_options) if encoder else None
        self.pairs, self.people = self.drawn.pairs(), self.drawn.plan.people
        if target == "other" and self.people < 2:
            raise ValueError(f"the same change on another person needs 2 people per change, {folder} has {self.people}")
        self.latents = latents_of(folder, vae) if vae else None
        self.seen = [i for i, pair in enumerate(self.pairs) if _may_be_seen(pair)]

    def __len__(self) -> int:
        return len(self.seen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self.seen[index]
        first = number - number % self.people
        others = [i for i in range(first, first + self.people) if i != number]
        nothing = float(torch.rand(())) < self.nothing
        goal = number if self.target == "mirrored" else others[int(torch.randint(len(others), ()))]
        shown = [number] if self.target == "mirrored" else [number, *(i for i in others if i != goal)]
        seen = "pairs" if self.features is None else "tokens"
        item: dict[str, Any] = {
            seen: torch.stack([self._seen(i, nothing) for i in shown]),
            "instructions": "" if nothing else self._asked(goal, "after"),
            "undoing": "" if nothing else self._asked(goal, "before"),
        }
        if self.target == "mirrored":
            return item | {"images": self._pictures(goal, nothing).flip(-1)}
        if self.latents is None:
            return item
        before, after = (torch.from_numpy(np.array(self.latents[2 * goal + i])).float() for i in (0, 1))
        item["labels"] = [_labels(self.pairs[goal], 0 if nothing else side) for side in (0, 1)]
        return item | {"before": before, "after": before if nothing else after}

    def _asked(self, number: int, side: str) -> str:
        """What asks for a side (``before`` or ``after``) of a pair."""
        return asked([(c.attribute, getattr(c, side)) for c in self.pairs[number].changes])

    def _seen(self, number: int, nothing: bool) -> Tensor:
        if self.features is None:
            return self._pictures(number, nothing)
        tokens = torch.from_numpy(np.array(self.features[2 * number : 2 * number + 2]))
        return tokens[[0, 0]] if nothing else tokens

    def _pictures(self, number: int, nothing: bool) -> Tensor:
        pixels = torch.from_numpy(np.array(self.drawn.images[2 * number : 2 * number + 2])).permute(0, 3, 1, 2)
        pixels = pixels.float().div_(255)
        return pixels[[0, 0]] if nothing else pixels


def _folders(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given


def _labels(pair: Pair, side: int) -> dict[str, int]:
    """The classes of what a side (0 before, 1 after) shows: nothing under a light that changes all colours."""
    person, scene = pair.after if side else pair.before
    return labels_of(person, scene, () if scene.tone != "plain" else tuple(ATTRIBUTES))


def _may_be_seen(pair: Pair) -> bool:
    attributes = frozenset(change.attribute for change in pair.changes)
    return not attributes & set(UNSEEN_KINDS) and attributes not in UNSEEN_TOGETHER


class PairsToPairs(L.LightningDataModule):
    """What ``ChangeTraining`` takes, of kinds a network may be trained on, from one folder or several (of as many
    people). ``target``: ``other``, the same change on another person (its further people are views), or ``mirrored``,
    the same pictures mirrored, which any pair allows. With probability ``nothing`` neither side changes. ``encoder``
    (with ``encoder_options``), if the network's is frozen, looks at all pictures once and for all. Without ``vae``
    there are no latents: for learning words alone."""

    def __init__(
        self, folder: str | list[str], validation: str, vae: str | None, batch_size: int = 16, target: str = "other",
        nothing: float = 0.03, encoder: str | None = None, encoder_options: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.save_hyperparameters(logger=False)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        h = self.hparams
        rest = (h["vae"], h["target"], h["nothing"], h["encoder"], h["encoder_options"])
        data: ConcatDataset[dict[str, Any]] = ConcatDataset([_Shown(folder, *rest) for folder in _folders(h["folder"])])
        return DataLoader(data, h["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        h = self.hparams
        data = _Shown(h["validation"], h["vae"], "other", 0.0, h["encoder"], h["encoder_options"])
        return DataLoader(data, 50)
