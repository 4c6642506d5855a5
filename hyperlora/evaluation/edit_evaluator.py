"""Run edits over pictures of unseen people and score what comes out against the drawn answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hyperlora.data.images import pixels_of
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.diffusion.image_editing import apply_edit
from hyperlora.encoders.attribute_classifier import Reader, read_in_batches
from hyperlora.evaluation.edit_benchmark import Edit, EditBenchmark
from hyperlora.evaluation.metrics import Score
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track

CHANGED: Final = 0.04
"""A pixel with a colour that changes by more than this, of 1, belongs to the edited region."""
Told = Callable[[Edit], str]
"""The words of an edit that the base is shown."""
MADE: Final = 0.7
"""An edit of which something is named by no attribute counts as made if so much of the way from B to the answer was
gone as well."""
METRICS: Final = {
    "accuracy": "what changes is read as asked (where attributes do not name all that changes: and made at least 0.7)",
    "preservation": "all else is read as in the drawn answer",
    "made": "how much of the way from B to the answer was gone, inside the edited region",
    "outside": "mean error against the answer outside that region, of 1",
    "psnr": "dB against the answer",
    "direction": "cosine of the features' change shown and made (Visual CLIP with the evaluator's features)",
    "leakage": "how much more the result looks like A' than the answer does, as a cosine",
}


@dataclass(frozen=True)
class EditRow:
    """One line of the table: each of ``METRICS`` per edit (the mean of its pictures), [edits] each; ``pictures``
    [n, 3, h, w] are what came out."""

    name: str
    values: Mapping[str, Tensor]
    edits: Sequence[Edit] = field(repr=False)
    pictures: Tensor = field(repr=False)
    seconds: float | None = None

    def score(self, metric: str, group: str | None = None) -> Score:
        """Over the edits of a group, or over all."""
        chosen = [group is None or edit.group == group for edit in self.edits]
        return Score.of(self.values[metric][torch.tensor(chosen)])

    def by_kind(self, metric: str) -> dict[str, float]:
        """The mean of each kind of edit."""
        found: dict[str, list[float]] = {}
        for edit, value in zip(self.edits, self.values[metric].tolist(), strict=True):
            found.setdefault(edit.kind, []).append(value)
        return {kind: sum(values) / len(values) for kind, values in found.items()}


@dataclass(frozen=True)
class EditJudge:
    """A benchmark, the edit base and the evaluator that scores."""

    base: Base
    reader: Reader
    benchmark: EditBenchmark
    steps: int = 20
    batch_size: int = 32

    @cached_property
    def edits(self) -> list[Edit]:
        """The edit of each picture to edit, in the order of all tensors here."""
        return [edit for edit in self.benchmark.edits for _ in edit.others]

    @cached_property
    def before(self) -> Tensor:
        return torch.cat([edit.others[:, 0] for edit in self.benchmark.edits])

    @cached_property
    def answers(self) -> Tensor:
        return torch.cat([edit.others[:, 1] for edit in self.benchmark.edits])

    @cached_property
    def round_trip(self) -> Tensor:
        """The answers through the autoencoder and back: what no edit can be better than."""
        return self.through_autoencoder(self.answers)

    @cached_property
    def answered(self) -> dict[str, list[int]]:
        """What the evaluator reads in the answers, by attribute."""
        return self._classes(self.answers)

    @cached_property
    def features(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The evaluator's, of the answers, the pictures to edit, and of the first pair shown before and after."""
        shown = torch.stack([edit.shown[0] for edit in self.edits])
        answers, before, first, second = map(self._features, (self.answers, self.before, shown[:, 0], shown[:, 1]))
        return answers, before, first, second

    @torch.no_grad()
    def through_autoencoder(self, pictures: Tensor) -> Tensor:
        parts = pictures.split(self.batch_size)
        return torch.cat([self.base.decode_latents(self.base.encode_images(part)) for part in parts])

    def row(
        self,
        name: str,
        loras: LoraWeights | None,
        *,
        told: Told | None = None,
        guidance: float = 1.0,
        seconds: float | None = None,
    ) -> EditRow:
        """Edit every picture (the same seeds in every row) and score; ``loras`` has one LoRA per edit of the benchmark,
        or no batch axis (one for all), or is None; ``told`` says what the base is told, if anything."""
        return self.scored(name, self.edited(name, loras, self.before, told, guidance), seconds)

    def edited(
        self, name: str, loras: LoraWeights | None, pictures: Tensor, told: Told | None = None, guidance: float = 1.0
    ) -> Tensor:
        """[n, 3, h, w]: ``pictures`` (one per entry of ``edits``) after the edits."""
        sizes = torch.tensor([len(edit.others) for edit in self.benchmark.edits])
        index = torch.arange(len(sizes)).repeat_interleave(sizes)
        parts: list[Image.Image] = []
        chunks = torch.arange(len(pictures)).split(self.batch_size)
        for chunk in track(list(chunks), name, "pictures", len(pictures), self.batch_size):
            lora = loras[index[chunk]] if loras is not None and loras.batch else loras
            words = [told(self.edits[i]) if told else "" for i in chunk.tolist()]
            parts += apply_edit(
                self.base, pictures[chunk], lora, seeds=[1000 + i for i in chunk.tolist()], instructions=words,
                steps=self.steps, guidance=guidance,
            )  # fmt: skip
        return pixels_of(parts)

    def scored(self, name: str, made: Tensor, seconds: float | None = None) -> EditRow:
        """``made`` [n, 3, h, w] in the order of ``edits``."""
        before, answers = self.before, self.answers
        region = ((answers - before).abs().amax(1, keepdim=True) > CHANGED).float()
        away = _mean((before - answers).abs(), region).clamp(min=1e-6)
        gone = 1 - _mean((made - answers).abs(), region) / away
        features = self._features(made)
        wanted, features_before, shown_before, shown_after = self.features
        right, kept = self._read(made, gone)
        values = {
            "accuracy": right,
            "preservation": kept,
            "made": gone,
            "outside": _mean((made - answers).abs(), 1 - region),
            "psnr": -10 * (made - answers).square().mean((1, 2, 3)).clamp(min=1e-8).log10(),
            "direction": F.cosine_similarity(shown_after - shown_before, features - features_before),
            "leakage": F.cosine_similarity(features, shown_after) - F.cosine_similarity(wanted, shown_after),
        }
        sizes = [len(edit.others) for edit in self.benchmark.edits]
        per_edit = {k: torch.stack([part.mean() for part in v.split(sizes)]) for k, v in values.items()}
        return EditRow(name, per_edit, self.benchmark.edits, made, seconds)

    def _read(self, made: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
        """Per picture: whether the edit was made, and the fraction of other attributes read as in the answer."""
        found, wanted, known = self._classes(made), self.answered, self.reader.attributes
        right, kept = [], []
        for i, edit in enumerate(self.edits):
            asked = [found[k][i] == known[k].index(v) for k, v in edit.truth.items()]
            right.append(all(asked) and (edit.all_named or float(gone[i]) >= MADE))
            others = [k for k in known if k not in edit.truth]
            kept.append(sum(found[k][i] == wanted[k][i] for k in others) / len(others))
        return torch.tensor(right).float(), torch.tensor(kept)

    def _classes(self, pictures: Tensor) -> dict[str, list[int]]:
        reading = read_in_batches(self.reader, pictures)
        return {name: logits.argmax(-1).tolist() for name, logits in reading.logits.items()}

    @torch.no_grad()
    def _features(self, pictures: Tensor) -> Tensor:
        return torch.cat([self.reader.encoder.pooled(part) for part in pictures.split(64)])


def _mean(error: Tensor, region: Tensor) -> Tensor:
    """Mean over colours and the places of ``region`` [n, 1, h, w], per picture; 0 for an empty one."""
    return (error.mean(1, keepdim=True) * region).sum((1, 2, 3)) / region.sum((1, 2, 3)).clamp(min=1)
