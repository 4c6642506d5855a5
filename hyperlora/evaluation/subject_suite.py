"""Suite of a subject evaluation: the LoRAs of a model, controls, and fine-tuned baselines."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from hyperlora.data.images import stack_images
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator, SubjectResult
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.refine import make_photo_examples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.config import GenerationConfig, LoraSampling
from hyperlora.pipelines.generate import generate_candidates
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase
from hyperlora.pipelines.photo_model import SubjectPhotos
from hyperlora.pipelines.refine_generated import refine_predictions
from hyperlora.pipelines.rerank import IdentityReranker
from hyperlora.seeds import compute_seed

BASELINE_NAME: Final = "base, no LoRA"
"""Name of the row of the base model."""


@dataclass(frozen=True)
class FineTuneBaseline:
    """Settings of DreamBooth-LoRA per subject (2208.12242), with the layout of the model.

    Attributes:
        num_steps: Optimizer steps.
        lr: Learning rate of Adam.
        batch_size: Examples of each subject per step.
        prior_loss_weight: Weight of the prior preservation loss (eq. 2); 0: none.
        num_class_images: Class images that the base samples for it.
        subjects_per_batch: Subjects that are fitted together.
    """

    num_steps: int = 300
    lr: float = 1e-3
    batch_size: int = 2
    prior_loss_weight: float = 1.0
    num_class_images: int = 32
    subjects_per_batch: int = 16


@dataclass(frozen=True)
class SubjectSuiteConfig:
    """Which LoRAs of a model are evaluated beside those from one photo and the controls.

    Attributes:
        strengths: Factors of the LoRAs from one photo.
        refine_steps: Steps of refined LoRAs; 0: none.
        finetune_baseline: Settings of fine-tuned LoRAs; None: none.
        sampling: How a generative model samples; subject i has the seed ``sampling.seed + i``.
        num_candidates: Samples per subject of which the best is kept; 1: none.
        reranker: Chooses the best of several samples.
    """

    strengths: tuple[float, ...] = (0.6, 0.8)
    refine_steps: int = 0
    finetune_baseline: FineTuneBaseline | None = None
    sampling: LoraSampling = field(default_factory=LoraSampling)
    num_candidates: int = 1
    reranker: IdentityReranker | None = None


def evaluate_suite(
    evaluator: SubjectEvaluator, model: ImageToLoraBase, config: SubjectSuiteConfig
) -> Iterator[SubjectResult]:
    """Evaluate the base model without LoRA, then ``evaluate_model``.

    Args:
        evaluator: Benchmark and evaluator.
        model: Model from photos to LoRAs.
        config: Which further LoRAs are evaluated.

    Yields:
        The rows of the table, each as soon as it is done.
    """
    yield evaluator.evaluate(BASELINE_NAME, None)
    yield from evaluate_model(evaluator, model, config)


def evaluate_model(
    evaluator: SubjectEvaluator, model: ImageToLoraBase, config: SubjectSuiteConfig
) -> Iterator[SubjectResult]:
    """Evaluate the LoRAs of a model from one photo and from all photos, its controls and variants.

    Controls are other strengths, the LoRAs of other subjects, and the mean LoRA.

    Args:
        evaluator: Benchmark and evaluator.
        model: Model from photos to LoRAs.
        config: Which further LoRAs are evaluated.

    Yields:
        The rows of the table, each as soon as it is done.
    """
    photos, sampling = evaluator.benchmark.photos, config.sampling
    first_photo = photos[:, :1]  # [subjects, 1, 3, h, w]
    loras, seconds = _measure_generation(
        lambda: generate_sequentially(model, first_photo, sampling)
    )
    yield evaluator.evaluate("one photo", loras, seconds, role="reference")
    for strength in config.strengths:
        yield evaluator.evaluate(f"one photo, strength {strength:g}", loras * strength, seconds)
    if photos.shape[1] > 1:
        multi_photo_loras, elapsed = _measure_generation(
            lambda: generate_sequentially(model, photos, sampling)
        )
        name = f"{photos.shape[1]} photos"
        yield evaluator.evaluate(name, multi_photo_loras, elapsed, role="variant")
    if config.num_candidates > 1:
        best_loras, elapsed = _measure_generation(
            lambda: _generate_best(model, first_photo, config)
        )
        name = f"one photo, best of {config.num_candidates}"
        yield evaluator.evaluate(name, best_loras, elapsed, role="variant")
    if len(loras) > 1:  # of a single subject these would be its own
        yield evaluator.evaluate("shuffled LoRA", loras.shuffle_batch())
        yield evaluator.evaluate("mean LoRA", loras.mean())
    if config.refine_steps:
        refined_loras, elapsed = _measure_generation(
            lambda: refine_predictions(
                model,
                evaluator.base,
                loras,
                first_photo,
                num_steps=config.refine_steps,
                progress_label="refining",
            )
        )
        name = f"one photo, refined {config.refine_steps} steps"
        yield evaluator.evaluate(name, refined_loras, elapsed, role="variant")
    if (baseline := config.finetune_baseline) is not None:
        finetuned_loras, elapsed = _measure_generation(
            lambda: fit_subject_loras(evaluator, model, first_photo, baseline)[baseline.num_steps]
        )
        name = f"fine-tuned per subject, {baseline.num_steps} steps"
        yield evaluator.evaluate(name, finetuned_loras, elapsed, role="variant")


def fit_subject_loras(
    evaluator: SubjectEvaluator,
    model: ImageToLoraBase,
    photos: Tensor,
    baseline: FineTuneBaseline,
    snapshot_steps: Sequence[int] = (),
) -> dict[int, LoraWeights]:
    """Fit DreamBooth-LoRAs (2208.12242), one per subject, with the layout of a model.

    Args:
        evaluator: Its base model is fine-tuned.
        model: Model whose layout and trigger phrase are used.
        photos: Photos of each subject [subjects, views, 3, h, w] in [0, 1].
        baseline: Settings of the fit.
        snapshot_steps: Further steps whose LoRAs are returned.

    Returns:
        LoRAs by number of steps, those of ``baseline.num_steps`` included.
    """
    base, layout = evaluator.base, model.layout
    trigger_phrase = model.trigger_phrase
    class_examples = (
        _make_class_examples(evaluator, baseline) if baseline.prior_loss_weight else None
    )
    all_steps = sorted({*snapshot_steps, baseline.num_steps})
    config = FineTuneConfig(
        num_steps=baseline.num_steps,
        lr=baseline.lr,
        batch_size=baseline.batch_size,
        prior_loss_weight=baseline.prior_loss_weight,
        snapshot_steps=all_steps,
        progress_label="fine-tuning",
    )
    flat_by_step: dict[int, list[Tensor]] = {n: [] for n in all_steps}
    for photo_batch in photos.split(baseline.subjects_per_batch):
        examples = make_photo_examples(base, photo_batch, f"a portrait of {trigger_phrase}")
        init_codes = LoraWeights.zeros(layout, (len(photo_batch),), layout.init_std).flatten()
        result = fine_tune_loras(
            base,
            examples,
            init_codes,
            partial(LoraWeights.unflatten, layout),
            config,
            prior_examples=class_examples.expand_subjects(len(photo_batch))
            if class_examples
            else None,
        )
        for n in all_steps:
            flat_by_step[n].append(result.snapshots[n].flatten())
    return {n: LoraWeights.unflatten(layout, torch.cat(flat)) for n, flat in flat_by_step.items()}


def _make_class_examples(
    evaluator: SubjectEvaluator, baseline: FineTuneBaseline
) -> TrainingExamples:
    """Sample class images with the base model, for prior preservation."""
    prompt = "a portrait of a person"
    num_images = baseline.num_class_images
    images = generate_images(
        evaluator.base,
        [prompt] * num_images,
        seeds=range(num_images),
        num_inference_steps=evaluator.num_inference_steps,
        guidance_scale=evaluator.guidance_scale,
    )
    return make_photo_examples(evaluator.base, stack_images(images)[None], prompt)


def generate_sequentially(
    model: ImageToLoraBase, photos: Tensor, sampling: LoraSampling | None = None
) -> LoraWeights:
    """Generate LoRAs one subject at a time, so that the time per LoRA is that of a single request.

    Args:
        model: Model from photos to LoRAs.
        photos: Photos of each subject [subjects, views, 3, h, w] in [0, 1].
        sampling: How a generative model samples; subject i has the seed ``sampling.seed + i``.

    Returns:
        One LoRA per subject.
    """
    sampling = sampling or LoraSampling()
    with torch.no_grad():
        loras = [
            model.forward(
                subject_photos[None], replace(sampling, seed=compute_seed(sampling.seed, i))
            )[0]
            for i, subject_photos in enumerate(photos)
        ]
    return LoraWeights.stack(loras)


def _generate_best(
    model: ImageToLoraBase, photos: Tensor, config: SubjectSuiteConfig
) -> LoraWeights:
    """Generate several LoRAs per subject and keep the one that the reranker ranks first."""
    num_candidates, loras = config.num_candidates, []
    for i, subject_photos in enumerate(photos):
        seed = compute_seed(config.sampling.seed, num_candidates * i)
        generation_config = GenerationConfig(
            num_candidates=num_candidates, sampling=replace(config.sampling, seed=seed)
        )
        features = model.encode_photos(subject_photos[None])
        subjects = [SubjectPhotos(subject_photos)]
        (best,) = generate_candidates(model, features, subjects, generation_config, config.reranker)
        loras.append(best[0])
    return LoraWeights.stack(loras)


def _measure_generation(generate_fn: Callable[[], LoraWeights]) -> tuple[LoraWeights, float]:
    """Generate LoRAs and measure the seconds per LoRA."""
    start_time = time.perf_counter()
    loras = generate_fn().to("cpu")  # which waits for an accelerator
    return loras, (time.perf_counter() - start_time) / len(loras)
