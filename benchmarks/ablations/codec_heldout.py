"""LoRAs of a build on trial: its subjects as a benchmark, what codecs keep of them, whether samples copy them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data_builder.build.plan import Plan, PlannedLora, read_plan
from data_builder.sources.crops import compute_center_box, crop_image
from data_builder.sources.sources import Source, source_from_dict
from data_builder.sources.types import Photo
from hyperlora.data.images import to_tensor
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.evaluation.benchmark import Benchmark, Prompt
from hyperlora.evaluation.metrics import Score, compute_max_train_cosine, compute_sample_diversity
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator, SubjectResult
from hyperlora.evaluation.subject_suite import generate_sequentially
from hyperlora.lora.merge import compare_deltas
from hyperlora.lora.normalization import LoraNormalizer
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase
from hyperlora.pipelines.lora_codec import LoraCodec


@dataclass(frozen=True)
class CodecResult:
    """One line of the table: a ``SubjectResult`` of scores and what else is known; ``identity_retention`` is I as a share of the originals'."""

    scores: SubjectResult
    identity_retention: float | None = None
    compression: float | None = None
    delta_error: float | None = None
    delta_cosine: float | None = None
    max_train_cosine: float | None = None
    sample_diversity: float | None = None


@dataclass(frozen=True)
class HeldOutEvaluation:
    """``test_loras`` [n, P] of subjects that ``training`` [m, P] knows nothing of, and ``judge`` over their photos. ``normalizer``
    is the training set's z-score, in which LoRAs are compared as numbers."""

    evaluator: SubjectEvaluator
    test_loras: LoraWeights
    train_rows: Tensor
    normalizer: LoraNormalizer

    def evaluate_original(self) -> CodecResult:
        """The LoRAs as they were fitted."""
        return self._evaluate_loras("as fitted", self.test_loras)

    def evaluate_codec(self, name: str, codec: LoraCodec, original: CodecResult) -> CodecResult:
        """What ``codec`` keeps of them."""
        reconstructed = codec.decode(codec.encode(self.test_loras))
        return replace(
            self._evaluate_loras(name, reconstructed, original),
            compression=codec.autoencoder.compression,
        )

    def evaluate_sampler(
        self,
        name: str,
        model: ImageToLoraBase,
        original: CodecResult,
        sampling: LoraSampling,
        num_samples: int = 4,
    ) -> CodecResult:
        """LoRAs that ``model`` makes of one photo each; ``num_samples`` of every subject tell how much they differ."""
        photos = self.evaluator.benchmark.photos[:, :1]
        start_time = time.perf_counter()
        sampled_loras = [
            generate_sequentially(
                model, photos, replace(sampling, seed=sampling.seed + i * len(photos))
            )
            for i in range(num_samples)
        ]
        seconds = (time.perf_counter() - start_time) / num_samples / len(photos)
        rows = torch.stack([self.normalizer.normalize(lora.flatten()) for lora in sampled_loras], 1)
        return replace(
            self._evaluate_loras(name, sampled_loras[0], original, seconds),
            spread=compute_sample_diversity(rows),
        )

    def _evaluate_loras(
        self,
        name: str,
        lora: LoraWeights,
        original: CodecResult | None = None,
        seconds: float | None = None,
    ) -> CodecResult:
        scores = self.evaluator.evaluate(name, lora, seconds)
        error, cosine = compare_deltas(self.test_loras, lora)
        mean_train_cosine = float(
            compute_max_train_cosine(
                self.normalizer.normalize(lora.flatten()), self.train_rows
            ).mean()
        )
        if original is None:
            return CodecResult(scores, max_train_cosine=mean_train_cosine)
        identity_retention = scores.identity.mean / original.scores.identity.mean
        return CodecResult(
            scores,
            identity_retention,
            None,
            float(error.mean()),
            float(cosine.mean()),
            mean_train_cosine,
        )


def make_held_out_evaluation(
    train_dir: Path,
    build: Path,
    make_evaluator: Callable[[Benchmark], SubjectEvaluator],
    prompts: Sequence[Prompt],
    resolution: int,
    num_subjects: int,
    split: str = "validation",
) -> HeldOutEvaluation:
    """The first ``num_subjects`` subjects of ``build_differential_lora`` that are of ``split``, under ``judge``; the LoRAs of ``training`` (its
    split train) beside them. Photos are read at ``resolution`` pixels; compared are those that the build kept back."""
    data, train_data = LoraDataset(build, split), LoraDataset(train_dir, "train")
    train_data.layout.check_compatible(data.layout)
    indices = [views[0] for views in map(data.list_subject_rows, data.subjects[:num_subjects])]
    plan = read_plan(build)
    planned_by_key = {(row.subject, row.repetition): row for row in plan.rows}
    subjects = [
        planned_by_key[data.records[i].subject, data.records[i].repetition] for i in indices
    ]
    normalizer = train_data.fit_normalizer()
    train_rows = torch.cat([normalizer.normalize(batch) for batch in train_data.iter_batches()])
    return HeldOutEvaluation(
        make_evaluator(_make_benchmark(subjects, plan, prompts, resolution)),
        data.get_weights(indices),
        train_rows,
        normalizer,
    )


def format_table(results: Sequence[CodecResult]) -> Iterator[str]:
    """Markdown, a line at a time."""
    yield "| | I | of the fitted | P | compression | error of ΔW | cosine | nearest of training | spread | seconds |"
    yield "|---" * 10 + "|"
    for result in results:
        cells = (
            _format_number(result.identity_retention),
            _format_score(result.scores.prompt_accuracy),
            _format_number(result.compression, ".0f"),
            _format_number(result.delta_error),
            _format_number(result.delta_cosine),
            _format_number(result.max_train_cosine),
            _format_number(result.sample_diversity),
            _format_number(result.scores.seconds),
        )
        yield f"| {result.scores.name} | {result.scores.identity} | {' | '.join(cells)} |"


def _make_benchmark(
    subjects: Sequence[PlannedLora], plan: Plan, prompts: Sequence[Prompt], resolution: int
) -> Benchmark:
    """Photos that were learned, and to compare with those that were not (if fewer than two, half of them)."""
    source = source_from_dict(plan.source)
    num_photos = min(len(subject.photos) for subject in subjects)
    num_val_photos = (
        plan.recipe.num_val_photos
        if plan.recipe.num_val_photos > 1
        else num_photos - num_photos // 2
    )
    pixels = torch.stack(
        [
            torch.stack([_load_photo(p, source, resolution) for p in s.photos[:num_photos]])
            for s in subjects
        ]
    )
    return Benchmark(
        tuple(s.subject for s in subjects),
        pixels[:, :-num_val_photos] if num_photos > num_val_photos else pixels,
        pixels[:, -num_val_photos:],
        tuple(prompts),
    )


def _load_photo(photo: Photo, source: Source, resolution: int) -> Tensor:
    image, _ = source.read_photo(photo.ref)
    return to_tensor(
        crop_image(image, photo.crop_box or compute_center_box(image), resolution), resolution
    )


def _format_number(value: float | None, format_spec: str = ".3f") -> str:
    return "–" if value is None else format(value, format_spec)


def _format_score(score: Score | None) -> str:
    return "–" if score is None else str(score)
