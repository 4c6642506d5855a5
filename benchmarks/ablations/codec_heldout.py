"""Evaluation of codecs and LoRA generators on held-out rows of a build.

The subjects of the rows become a benchmark. Reconstructed and generated LoRAs are compared with the
original rows as vectors, and by the images that they give.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

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
from hyperlora.evaluation.tables import EMPTY_CELL, format_markdown_table
from hyperlora.lora.merge import compare_deltas
from hyperlora.lora.normalization import LoraNormalizer
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase
from hyperlora.pipelines.lora_codec import LoraCodec

_COLUMNS: Final = (
    "",
    "identity",
    "identity retention",
    "prompt accuracy",
    "compression",
    "error of ΔW",
    "cosine",
    "max train cosine",
    "sample diversity",
    "seconds",
)


@dataclass(frozen=True)
class CodecResult:
    """One row of the table.

    Attributes:
        scores: Identity and prompt accuracy.
        identity_retention: Identity score relative to that of the original LoRAs.
        compression: Parameters of a LoRA per latent number.
        delta_error: Mean relative error of ΔW.
        delta_cosine: Mean cosine of ΔW with the original.
        max_train_cosine: Mean cosine to the nearest training LoRA.
        sample_diversity: 1 - the mean cosine between samples of a subject.
    """

    scores: SubjectResult
    identity_retention: float | None = None
    compression: float | None = None
    delta_error: float | None = None
    delta_cosine: float | None = None
    max_train_cosine: float | None = None
    sample_diversity: float | None = None


@dataclass(frozen=True)
class HeldOutEvaluation:
    """Held-out LoRAs of a build with an evaluator over photos of their subjects.

    Attributes:
        evaluator: Evaluator over the subjects.
        test_loras: LoRAs of the subjects, a batch [n].
        train_rows: Normalized training LoRAs [m, P].
        normalizer: Normalizer (z-score) of the training set.
    """

    evaluator: SubjectEvaluator
    test_loras: LoraWeights
    train_rows: Tensor
    normalizer: LoraNormalizer

    def evaluate_original(self) -> CodecResult:
        """Evaluate the LoRAs as they were fine-tuned."""
        return self._evaluate_loras("as fitted", self.test_loras)

    def evaluate_codec(self, name: str, codec: LoraCodec, original: CodecResult) -> CodecResult:
        """Evaluate the LoRAs after encoding and decoding.

        Args:
            name: Name of the row.
            codec: Codec of LoRAs.
            original: Result of the original LoRAs.

        Returns:
            A row of the table.
        """
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
        """Evaluate the LoRAs that a model generates from one photo of each subject.

        Args:
            name: Name of the row.
            model: Model from photos to LoRAs.
            original: Result of the original LoRAs.
            sampling: How the model samples.
            num_samples: Samples of each subject, for their diversity; the first is scored.

        Returns:
            A row of the table.
        """
        photos = self.evaluator.benchmark.photos[:, :1]
        start_time = time.perf_counter()
        samplings = [
            replace(sampling, seed=sampling.seed + i * len(photos)) for i in range(num_samples)
        ]
        sampled_loras = [generate_sequentially(model, photos, sampling) for sampling in samplings]
        seconds = (time.perf_counter() - start_time) / num_samples / len(photos)
        return self.evaluate_samples(name, sampled_loras, original, seconds)

    def evaluate_samples(
        self,
        name: str,
        sampled_loras: Sequence[LoraWeights],
        original: CodecResult,
        seconds: float | None = None,
    ) -> CodecResult:
        """Evaluate LoRAs that were generated for each subject.

        Args:
            name: Name of the row.
            sampled_loras: Samples, each one LoRA per subject; the first is scored.
            original: Result of the original LoRAs.
            seconds: Time per LoRA.

        Returns:
            A row of the table.
        """
        rows = torch.stack(
            [self.normalizer.normalize(loras.flatten()) for loras in sampled_loras], 1
        )  # [n, samples, P]
        return replace(
            self._evaluate_loras(name, sampled_loras[0], original, seconds),
            sample_diversity=compute_sample_diversity(rows),
        )

    def _evaluate_loras(
        self,
        name: str,
        loras: LoraWeights,
        original: CodecResult | None = None,
        seconds: float | None = None,
    ) -> CodecResult:
        """Score LoRAs and compare them with the original ones and the training set."""
        scores = self.evaluator.evaluate(name, loras, seconds)
        error, cosine = compare_deltas(self.test_loras, loras)
        rows = self.normalizer.normalize(loras.flatten())  # [n, P]
        mean_train_cosine = float(compute_max_train_cosine(rows, self.train_rows).mean())
        if original is None:
            return CodecResult(scores, max_train_cosine=mean_train_cosine)
        identity_retention = scores.identity.mean / original.scores.identity.mean
        return CodecResult(
            scores,
            identity_retention=identity_retention,
            delta_error=float(error.mean()),
            delta_cosine=float(cosine.mean()),
            max_train_cosine=mean_train_cosine,
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
    """Make an evaluation over the subjects of a held-out build.

    Args:
        train_dir: Build or pack whose split train codecs and models were trained on.
        build: Build of other subjects.
        make_evaluator: Makes an evaluator over a benchmark.
        prompts: Prompts of the benchmark.
        resolution: Side of the photos in pixels.
        num_subjects: Number of subjects, the first of the split.
        split: Split of ``build``.

    Returns:
        The evaluation. Photos that the build did not train on are the comparison photos.
    """
    data, train_data = LoraDataset(build, split), LoraDataset(train_dir, "train")
    train_data.layout.check_compatible(data.layout)
    subject_names = data.subjects[:num_subjects]
    indices = [data.list_subject_rows(subject)[0] for subject in subject_names]
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


def format_table(results: Sequence[CodecResult]) -> list[str]:
    """Format the results as lines of a Markdown table."""
    rows = []
    for result in results:
        cells = (
            result.scores.name,
            str(result.scores.identity),
            _format_number(result.identity_retention),
            _format_score(result.scores.prompt_accuracy),
            _format_number(result.compression, ".0f"),
            _format_number(result.delta_error),
            _format_number(result.delta_cosine),
            _format_number(result.max_train_cosine),
            _format_number(result.sample_diversity),
            _format_number(result.scores.seconds),
        )
        rows.append(cells)
    return format_markdown_table(_COLUMNS, rows)


def _make_benchmark(
    subjects: Sequence[PlannedLora], plan: Plan, prompts: Sequence[Prompt], resolution: int
) -> Benchmark:
    """Make a benchmark of the subjects' photos.

    The validation photos of the build are for comparison; if there are fewer than two, half of all
    photos.
    """
    source = source_from_dict(plan.source)
    num_photos = min(len(subject.photos) for subject in subjects)
    num_val_photos = (
        plan.recipe.num_val_photos
        if plan.recipe.num_val_photos > 1
        else num_photos - num_photos // 2
    )
    pixels = torch.stack(
        [
            torch.stack(
                [_load_photo(photo, source, resolution) for photo in subject.photos[:num_photos]]
            )
            for subject in subjects
        ]
    )  # [subjects, photos, 3, resolution, resolution]
    return Benchmark(
        tuple(subject.subject for subject in subjects),
        pixels[:, :-num_val_photos] if num_photos > num_val_photos else pixels,
        pixels[:, -num_val_photos:],
        tuple(prompts),
    )


def _load_photo(photo: Photo, source: Source, resolution: int) -> Tensor:
    """Load a photo as a tensor [3, resolution, resolution]."""
    image, _ = source.read_photo(photo.ref)
    return to_tensor(
        crop_image(image, photo.crop_box or compute_center_box(image), resolution), resolution
    )


def _format_number(value: float | None, format_spec: str = ".3f") -> str:
    return EMPTY_CELL if value is None else format(value, format_spec)


def _format_score(score: Score | None) -> str:
    return EMPTY_CELL if score is None else str(score)
