"""LoRAs of a build on trial: its subjects as a benchmark, what codecs keep of them, whether samples copy them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data_builder.build.plan import Plan, Planned, read_plan
from data_builder.sources.crops import centre, cut
from data_builder.sources.sources import Source, opened
from data_builder.sources.types import Photo
from hyperlora.data.images import to_tensor
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.evaluation.benchmark import Benchmark, Prompt
from hyperlora.evaluation.metrics import Score, nearest, spread
from hyperlora.evaluation.subject_evaluator import Judge, Row
from hyperlora.evaluation.subject_suite import one_by_one
from hyperlora.lora.merge import apart
from hyperlora.lora.normalization import RowScale
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora_base import PhotoModel, Sampling
from hyperlora.pipelines.lora_codec import LoraCodec


@dataclass(frozen=True)
class Tried:
    """One line of the table: a ``Row`` of scores and what else is known; ``kept`` is I as a share of the originals'."""

    row: Row
    kept: float | None = None
    compression: float | None = None
    error: float | None = None
    cosine: float | None = None
    nearest: float | None = None
    spread: float | None = None


@dataclass(frozen=True)
class HeldOut:
    """``rows`` [n, P] of subjects that ``training`` [m, P] knows nothing of, and ``judge`` over their photos. ``scale``
    is the training set's z-score, in which LoRAs are compared as numbers."""

    judge: Judge
    rows: LoraWeights
    training: Tensor
    scale: RowScale

    def original(self) -> Tried:
        """The LoRAs as they were fitted."""
        return self._tried("as fitted", self.rows)

    def decoded(self, name: str, codec: LoraCodec, original: Tried) -> Tried:
        """What ``codec`` keeps of them."""
        made = codec.decode(codec.encode(self.rows))
        return replace(self._tried(name, made, original), compression=codec.autoencoder.compression)

    def sampled(self, name: str, model: PhotoModel, original: Tried, how: Sampling, samples: int = 4) -> Tried:
        """LoRAs that ``model`` makes of one photo each; ``samples`` of every subject tell how much they differ."""
        photos = self.judge.benchmark.photos[:, :1]
        began = time.perf_counter()
        made = [one_by_one(model, photos, replace(how, seed=how.seed + i * len(photos))) for i in range(samples)]
        seconds = (time.perf_counter() - began) / samples / len(photos)
        rows = torch.stack([self.scale.normalize(lora.flatten()) for lora in made], 1)
        return replace(self._tried(name, made[0], original, seconds), spread=spread(rows))

    def _tried(
        self, name: str, lora: LoraWeights, original: Tried | None = None, seconds: float | None = None
    ) -> Tried:  # fmt: skip
        row = self.judge.row(name, lora, seconds)
        error, cosine = apart(self.rows, lora)
        near = float(nearest(self.scale.normalize(lora.flatten()), self.training).mean())
        if original is None:
            return Tried(row, nearest=near)
        kept = row.identity.mean / original.row.identity.mean
        return Tried(row, kept, None, float(error.mean()), float(cosine.mean()), near)


def held_out(
    training: Path, build: Path, judge: Callable[[Benchmark], Judge], prompts: Sequence[Prompt], size: int,
    people: int, split: str = "validation",
) -> HeldOut:  # fmt: skip
    """The first ``people`` subjects of ``build`` that are of ``split``, under ``judge``; the LoRAs of ``training`` (its
    split train) beside them. Photos are read at ``size`` pixels; compared are those that the build kept back."""
    data, known = LoraDataset(build, split), LoraDataset(training, "train")
    known.layout.require(data.layout)
    chosen = [views[0] for views in map(data.views, data.subjects[:people])]
    plan = read_plan(build)
    planned = {(row.subject, row.view): row for row in plan.rows}
    subjects = [planned[data.records[i].subject, data.records[i].view] for i in chosen]
    scale = known.scale()
    rows = torch.cat([scale.normalize(batch) for batch in known.batches()])
    return HeldOut(judge(_benchmark(subjects, plan, prompts, size)), data.lora(chosen), rows, scale)


def table(tried: Sequence[Tried]) -> Iterator[str]:
    """Markdown, a line at a time."""
    yield "| | I | of the fitted | P | compression | error of ΔW | cosine | nearest of training | spread | seconds |"
    yield "|---" * 10 + "|"
    for t in tried:
        numbers = (
            _said(t.kept), _score(t.row.prompt), _said(t.compression, ".0f"), _said(t.error), _said(t.cosine),
            _said(t.nearest), _said(t.spread), _said(t.row.seconds),
        )  # fmt: skip
        yield f"| {t.row.name} | {t.row.identity} | {' | '.join(numbers)} |"


def _benchmark(subjects: Sequence[Planned], plan: Plan, prompts: Sequence[Prompt], size: int) -> Benchmark:
    """Photos that were learned, and to compare with those that were not (if fewer than two, half of them)."""
    source = opened(plan.source)
    most = min(len(subject.photos) for subject in subjects)
    kept = plan.recipe.held_out if plan.recipe.held_out > 1 else most - most // 2
    pixels = torch.stack([torch.stack([_read(p, source, size) for p in s.photos[:most]]) for s in subjects])
    return Benchmark(
        tuple(s.subject for s in subjects), pixels[:, :-kept] if most > kept else pixels, pixels[:, -kept:],
        tuple(prompts),
    )  # fmt: skip


def _read(photo: Photo, source: Source, size: int) -> Tensor:
    image, _ = source.read(photo.ref)
    return to_tensor(cut(image, photo.square or centre(image), size), size)


def _said(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def _score(score: Score | None) -> str:
    return "–" if score is None else str(score)
