"""Data modules over rendered before/after pairs: for an edit base, and for a pair hypernetwork."""

from collections.abc import Sequence
from typing import Final, Literal, Required, TypedDict

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from data_builder.avatars.edits import AttributeEdit, AvatarPair, sample_edit
from data_builder.avatars.instructions import (
    HELD_OUT_COMBINATIONS,
    HELD_OUT_KINDS,
    compose_instruction,
    compose_instruction_with_undo,
    format_instruction,
)
from data_builder.avatars.pair_dataset import PairDataset
from data_builder.datamodules.feature_cache import load_cached_features, load_cached_latents
from data_builder.datamodules.portraits import ATTRIBUTES, make_attribute_labels
from hyperlora.data.images import array_to_tensor
from hyperlora.training.batches import EditBatch, PairBatch
from hyperlora.training.modules.options import Options

TargetPair = Literal["other_identity", "mirrored"]
"""The edit that a pair's LoRA must make: the same on another identity, or on the mirrored pair."""
_USE_MIXTURE_PROB: Final = 0.5
"""Probability of a mixture of named colors instead of a color's name."""
_SENTENCE_PROB: Final = 0.25
"""Probability of one sentence for several edits instead of a sum of prompts."""
_REVERSED_UNDO_PROB: Final = 0.3
"""Probability, among undo instructions, of the negated instruction of the way back."""
_OTHER_VALUE_PROB: Final = 0.3
"""Probability, among undo instructions, of a previous value that another identity had."""


class _EditSample(TypedDict):
    """Fields as in ``EditBatch``, without batch axis."""

    before: Tensor
    after: Tensor
    instructions: str
    labels: dict[str, int]


class EditLatentDataset(Dataset[_EditSample]):
    """Latents of pairs in both directions with random instructions.

    Sample 2 i is pair i forward, 2 i + 1 backward. Several edits are one sum of prompts or, less
    often, one sentence. A color with a name is called by it, or by a mixture of named colors.

    Args:
        folder: Folder of rendered pairs.
        vae: Folder of the autoencoder.
        identity_edit_prob: Probability of an empty instruction that leaves the image as it is.
        undo_prob: Probability of the instruction that a LoRA of the edit stands for: the edit
            minus the way back, or the negated instruction of the reverse edit.
    """

    def __init__(
        self, folder: str, vae: str, identity_edit_prob: float, undo_prob: float = 0.0
    ) -> None:
        self.pairs = PairDataset(folder).list_pairs()
        self.identity_edit_prob, self.undo_prob = identity_edit_prob, undo_prob
        self.latents = load_cached_latents(folder, vae)

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    def __getitem__(self, index: int) -> _EditSample:
        pair_index, is_reverse = divmod(index, 2)
        pair = self.pairs[pair_index]
        edits = [edit.reverse() if is_reverse else edit for edit in pair.edits]
        # image 2 i is before the edit of pair i, image 2 i + 1 after it
        before, after = index, index ^ 1
        instruction = self._sample_instruction(edits)
        if _sample_bernoulli(self.identity_edit_prob):
            instruction, after = "", before
        return {
            "before": _read_latents(self.latents, before),
            "after": _read_latents(self.latents, after),
            "instructions": instruction,
            "labels": _make_side_labels(pair, after % 2),
        }

    def _sample_instruction(self, edits: Sequence[AttributeEdit]) -> str:
        values = [(edit.attribute, edit.after) for edit in edits]
        use_mixture = _sample_bernoulli(_USE_MIXTURE_PROB)
        if _sample_bernoulli(self.undo_prob):
            return _sample_undo_instruction(edits, values, use_mixture)
        if len(values) > 1 and _sample_bernoulli(_SENTENCE_PROB):
            return ", ".join(format_instruction(*value) for value in values)
        return compose_instruction(values, use_mixture)


def _sample_undo_instruction(
    edits: Sequence[AttributeEdit], values: Sequence[tuple[str, str]], use_mixture: bool
) -> str:
    """Sample the instruction that a LoRA of the edits stands for; ``values`` is what they set."""
    from_other_identity = _sample_bernoulli(_OTHER_VALUE_PROB)
    previous_values = [
        (edit.attribute, _sample_previous_value(edit) if from_other_identity else edit.before)
        for edit in edits
    ]
    if _sample_bernoulli(_REVERSED_UNDO_PROB):
        return compose_instruction_with_undo(previous_values, values, use_mixture, undo=True)
    return compose_instruction_with_undo(values, previous_values, use_mixture)


def _sample_previous_value(edit: AttributeEdit) -> str:
    """Sample a value that another identity may have had before the edit."""
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    value = sample_edit(rng, edit.kind).before
    return edit.before if value == edit.after else value


def _sample_bernoulli(probability: float) -> bool:
    return float(torch.rand(())) < probability


def _read_latents(latents: np.ndarray, index: int) -> Tensor:
    """Read scaled latents [c, h, w] of one image as float32."""
    return torch.from_numpy(np.array(latents[index])).float()


class EditLatentDataModule(L.LightningDataModule):
    """Load latents before and after edits with instructions, as ``EditBatch``.

    Args:
        folder: Folder or folders of training pairs.
        validation: Folder of validation pairs.
        vae: Folder of the autoencoder.
        batch_size: Edits per step.
        identity_edit_prob: Probability of an empty instruction that leaves the image as it is.
        undo_prob: Probability of the instruction that a LoRA of the edit stands for (see
            ``EditLatentDataset``).
    """

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

    def train_dataloader(self) -> DataLoader[_EditSample]:
        """Make the loader of shuffled training batches, without an incomplete last one."""
        h = self.hparams
        data: ConcatDataset[_EditSample] = ConcatDataset(
            [
                EditLatentDataset(folder, h["vae"], h["identity_edit_prob"], h["undo_prob"])
                for folder in _list_folders(h["folder"])
            ]
        )
        return DataLoader(
            data, h["batch_size"], shuffle=True, drop_last=True, collate_fn=EditBatch.collate
        )

    def val_dataloader(self) -> DataLoader[_EditSample]:
        """Make the loader of validation batches, without empty and undo instructions."""
        data = EditLatentDataset(self.hparams["validation"], self.hparams["vae"], 0.0)
        return DataLoader(data, 64, collate_fn=EditBatch.collate)


class PairSample(TypedDict, total=False):
    """Fields as in ``PairBatch``, without batch axis."""

    instructions: Required[str]
    undo_instructions: Required[str]
    pairs: Tensor
    tokens: Tensor
    before: Tensor
    after: Tensor
    images: Tensor
    labels_before: dict[str, int]
    labels_after: dict[str, int]


class PairTransferDataset(Dataset[PairSample]):
    """Example pairs of an edit, and the same edit elsewhere as target.

    Edits of held-out kinds and combinations are left out.

    Args:
        folder: Folder of rendered pairs.
        vae: Folder of the autoencoder of the target's latents; None for no latents.
        target_pair: Which edit is the target. The other identities of an edit are further examples.
        identity_edit_prob: Probability that no side of a sample is edited.
        encoder: Frozen encoder whose features replace the example images; None for images.
        encoder_options: Arguments of the encoder.

    Raises:
        ValueError: The target is another identity, but each edit has only one.
    """

    def __init__(
        self,
        folder: str,
        vae: str | None,
        target_pair: TargetPair,
        identity_edit_prob: float,
        encoder: str | None = None,
        encoder_options: Options | None = None,
    ) -> None:
        self.dataset = PairDataset(folder)
        self.is_mirrored, self.identity_edit_prob = target_pair == "mirrored", identity_edit_prob
        self.features = load_cached_features(folder, encoder, encoder_options) if encoder else None
        self.pairs = self.dataset.list_pairs()
        self.identities_per_edit = self.dataset.config.identities_per_edit
        if not self.is_mirrored and self.identities_per_edit < 2:
            raise ValueError(
                "the same edit on another identity needs 2 identities per edit, "
                f"{folder} has {self.identities_per_edit}"
            )
        self.latents = load_cached_latents(folder, vae) if vae else None
        self.train_indices = [i for i, pair in enumerate(self.pairs) if _is_training_pair(pair)]

    def __len__(self) -> int:
        return len(self.train_indices)

    def __getitem__(self, index: int) -> PairSample:
        pair_index = self.train_indices[index]
        is_identity_edit = _sample_bernoulli(self.identity_edit_prob)
        target, examples = self._sample_target(pair_index)
        encoder_input = torch.stack([self._load_input(i, is_identity_edit) for i in examples])
        sample: PairSample = {
            "instructions": "" if is_identity_edit else self._make_instruction(target, "after"),
            "undo_instructions": (
                "" if is_identity_edit else self._make_instruction(target, "before")
            ),
        }
        sample["pairs" if self.features is None else "tokens"] = encoder_input
        if self.is_mirrored:
            sample["images"] = self._load_images(target, is_identity_edit).flip(-1)
        elif self.latents is not None:
            after_side = 0 if is_identity_edit else 1
            pair = self.pairs[target]
            sample["before"] = _read_latents(self.latents, 2 * target)
            sample["after"] = _read_latents(self.latents, 2 * target + after_side)
            sample["labels_before"] = _make_side_labels(pair, 0)
            sample["labels_after"] = _make_side_labels(pair, after_side)
        return sample

    def _sample_target(self, pair_index: int) -> tuple[int, list[int]]:
        """Sample the pair of the target, and list the pairs that are its examples."""
        if self.is_mirrored:
            return pair_index, [pair_index]
        first = pair_index - pair_index % self.identities_per_edit
        others = [i for i in range(first, first + self.identities_per_edit) if i != pair_index]
        target = others[int(torch.randint(len(others), ()))]
        return target, [pair_index, *(i for i in others if i != target)]

    def _make_instruction(self, pair_index: int, side: Literal["before", "after"]) -> str:
        """Compose the instruction that asks for one side of a pair."""
        edits = self.pairs[pair_index].edits
        return compose_instruction([(edit.attribute, getattr(edit, side)) for edit in edits])

    def _load_input(self, pair_index: int, is_identity_edit: bool) -> Tensor:
        """Load both sides of an example as the encoder takes them, or as features."""
        if self.features is None:
            return self._load_images(pair_index, is_identity_edit)
        tokens = torch.from_numpy(np.array(self.features[2 * pair_index : 2 * pair_index + 2]))
        return tokens[[0, 0]] if is_identity_edit else tokens  # [2, num_tokens, width]

    def _load_images(self, pair_index: int, is_identity_edit: bool) -> Tensor:
        """Load both sides of a pair as images [2, 3, size, size] in [0, 1]."""
        images = array_to_tensor(self.dataset.images[2 * pair_index : 2 * pair_index + 2])
        return images[[0, 0]] if is_identity_edit else images


def _list_folders(folder: str | list[str]) -> list[str]:
    return [folder] if isinstance(folder, str) else folder


def _make_side_labels(pair: AvatarPair, side: int) -> dict[str, int]:
    """Make the labels of one side, 0 before and 1 after; none under a tone, which shifts colors."""
    person, scene = pair.after if side else pair.before
    return make_attribute_labels(person, scene, () if scene.tone != "plain" else tuple(ATTRIBUTES))


def _is_training_pair(pair: AvatarPair) -> bool:
    attributes = frozenset(edit.attribute for edit in pair.edits)
    return not attributes & set(HELD_OUT_KINDS) and attributes not in HELD_OUT_COMBINATIONS


class PairDataModule(L.LightningDataModule):
    """Load example pairs with the same edit elsewhere, as ``PairBatch``.

    Args:
        folder: Folder or folders of training pairs, all with as many identities per edit.
        validation: Folder of validation pairs.
        vae: Folder of the autoencoder of the target's latents; None trains instructions alone.
        batch_size: Edits per step.
        target_pair: The edit to make: on another identity, or on the mirrored pair, for which one
            identity per edit is enough. Validation always uses another identity.
        identity_edit_prob: Probability that no side of a sample is edited.
        encoder: The network's encoder if it is frozen: its features are then computed once and
            cached, and take the place of the images. None for images.
        encoder_options: Arguments of the encoder.
    """

    def __init__(
        self,
        folder: str | list[str],
        validation: str,
        vae: str | None,
        batch_size: int = 16,
        target_pair: TargetPair = "other_identity",
        identity_edit_prob: float = 0.03,
        encoder: str | None = None,
        encoder_options: Options | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)

    def train_dataloader(self) -> DataLoader[PairSample]:
        """Make the loader of shuffled training batches, without an incomplete last one."""
        h = self.hparams
        data: ConcatDataset[PairSample] = ConcatDataset(
            [
                self._make_dataset(folder, h["target_pair"], h["identity_edit_prob"])
                for folder in _list_folders(h["folder"])
            ]
        )
        return DataLoader(
            data, h["batch_size"], shuffle=True, drop_last=True, collate_fn=PairBatch.collate
        )

    def val_dataloader(self) -> DataLoader[PairSample]:
        """Make the loader of validation batches."""
        data = self._make_dataset(self.hparams["validation"], "other_identity", 0.0)
        return DataLoader(data, 50, collate_fn=PairBatch.collate)

    def _make_dataset(
        self, folder: str, target_pair: TargetPair, identity_edit_prob: float
    ) -> PairTransferDataset:
        h = self.hparams
        return PairTransferDataset(
            folder, h["vae"], target_pair, identity_edit_prob, h["encoder"], h["encoder_options"]
        )
