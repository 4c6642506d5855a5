"""The table of a model: its LoRAs and every control (no LoRA, mean, shuffled, fitted, strengths, views)."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from hyperlora.data.images import stack_images
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator, SubjectResult
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.refine import make_photo_examples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.generate import GenerationConfig, SubjectPhotos, generate_candidates
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase, SamplingConfig
from hyperlora.pipelines.refine_generated import refine_predictions
from hyperlora.pipelines.rerank import IdentityReranker

BASELINE_NAME: Final = "base, no LoRA"


@dataclass(frozen=True)
class FineTuneBaseline:
    """A LoRA fitted per subject on its one photo, the model's sites and rank: Adam, with prior preservation on
    ``num_class_images`` pictures that the base itself draws of the class."""

    num_steps: int = 300
    lr: float = 1e-3
    batch_size: int = 2
    prior_loss_weight: float = 1.0
    num_class_images: int = 32
    subjects_per_batch: int = 16


def evaluate_suite(
    evaluator: SubjectEvaluator, model: ImageToLoraBase, **options: Any
) -> Iterator[SubjectResult]:
    """Score the base and ``evaluate_model`` the model, which takes the ``options``."""
    yield evaluator.evaluate(BASELINE_NAME, None)
    yield from evaluate_model(evaluator, model, **options)


def evaluate_model(
    evaluator: SubjectEvaluator,
    model: ImageToLoraBase,
    *,
    strengths: tuple[float, ...] = (0.6, 0.8),
    refine_steps: int = 0,
    finetune_baseline: FineTuneBaseline | None = None,
    sampling: SamplingConfig | None = None,
    num_candidates: int = 1,
    reranker: IdentityReranker | None = None,
) -> Iterator[SubjectResult]:
    """Score the model from one photo and from all, its controls and, if asked, refined and fitted LoRAs, and the
    likest of ``num_candidates`` samples (as ``reranker`` finds)."""
    photos = evaluator.benchmark.photos
    first_photo = photos[:, :1]
    loras, seconds = _measure_generation(
        lambda: generate_sequentially(model, first_photo, sampling)
    )
    yield evaluator.evaluate("one photo", loras, seconds)
    for strength in strengths:
        yield evaluator.evaluate(f"one photo, strength {strength:g}", loras * strength, seconds)
    if photos.shape[1] > 1:
        multi_photo_loras, seconds = _measure_generation(
            lambda: generate_sequentially(model, photos, sampling)
        )
        yield evaluator.evaluate(f"{photos.shape[1]} photos", multi_photo_loras, seconds)
    if num_candidates > 1:
        best_loras, elapsed = _measure_generation(
            lambda: _generate_best(
                model, first_photo, sampling or SamplingConfig(), num_candidates, reranker
            )
        )
        yield evaluator.evaluate(f"one photo, best of {num_candidates}", best_loras, elapsed)
    if len(loras) > 1:  # of a single subject these would be its own
        yield evaluator.evaluate(
            "shuffled: another's LoRA", loras[torch.arange(len(loras)).roll(1)]
        )
        yield evaluator.evaluate("mean LoRA", loras.mean())
    if refine_steps:
        refined_loras, elapsed = _measure_generation(
            lambda: refine_predictions(
                model,
                evaluator.base,
                loras,
                first_photo,
                num_steps=refine_steps,
                progress_label="refining",
            )
        )
        yield evaluator.evaluate(f"one photo, refined {refine_steps} steps", refined_loras, elapsed)
    if finetune_baseline is not None:
        finetuned_loras, elapsed = _measure_generation(
            lambda: fit_subject_loras(evaluator, model, first_photo, finetune_baseline)[
                finetune_baseline.num_steps
            ]
        )
        yield evaluator.evaluate(
            f"fitted per subject, {finetune_baseline.num_steps} steps", finetuned_loras, elapsed
        )


def fit_subject_loras(
    evaluator: SubjectEvaluator,
    model: ImageToLoraBase,
    photos: Tensor,
    baseline: FineTuneBaseline,
    snapshot_steps: Sequence[int] = (),
) -> dict[int, LoraWeights]:
    """DreamBooth-LoRA per subject, ``baseline.subjects_per_batch`` subjects at once; by number of steps: each of ``snapshot_steps``, and
    ``baseline.num_steps``."""
    base, layout = evaluator.base, model.layout
    trigger_phrase = model.card.get("trigger_phrase", "sks person")
    class_examples = (
        _make_class_examples(evaluator, baseline) if baseline.prior_loss_weight else None
    )
    std = (sum(s.in_features for s in layout.targets) / len(layout.targets)) ** -0.5
    all_steps = sorted({*snapshot_steps, baseline.num_steps})
    flat_by_step: dict[int, list[Tensor]] = {n: [] for n in all_steps}
    for photo_batch in photos.split(baseline.subjects_per_batch):
        examples = make_photo_examples(base, photo_batch, f"a portrait of {trigger_phrase}")
        init_codes = LoraWeights.zeros(layout, (len(photo_batch),), std).flatten()
        result = fine_tune_loras(
            base.denoiser,
            base.noise_scheduler,
            examples,
            init_codes,
            partial(LoraWeights.unflatten, layout),
            num_steps=baseline.num_steps,
            lr=baseline.lr,
            batch_size=baseline.batch_size,
            prior_loss_weight=baseline.prior_loss_weight,
            prior_examples=class_examples.expand_subjects(len(photo_batch))
            if class_examples
            else None,
            snapshot_steps=all_steps,
            progress_label="fitting",
        )
        for n in all_steps:
            flat_by_step[n].append(result.snapshots[n].flatten())
    return {n: LoraWeights.unflatten(layout, torch.cat(flat)) for n, flat in flat_by_step.items()}


def _make_class_examples(
    evaluator: SubjectEvaluator, baseline: FineTuneBaseline
) -> TrainingExamples:
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
    model: ImageToLoraBase, photos: Tensor, sampling: SamplingConfig | None = None
) -> LoraWeights:
    """Single forward passes, as a user makes them, so that the time per LoRA is honest; each by a seed of its own."""
    base_sampling = sampling or SamplingConfig()
    with torch.no_grad():
        loras = [
            model.forward(p[None], replace(base_sampling, seed=base_sampling.seed + i))[0]
            for i, p in enumerate(photos)
        ]
    return LoraWeights.stack(loras)


def _generate_best(
    model: ImageToLoraBase,
    photos: Tensor,
    sampling: SamplingConfig,
    num_candidates: int,
    reranker: IdentityReranker | None,
) -> LoraWeights:
    config, loras = GenerationConfig(num_candidates=num_candidates), []
    for i, p in enumerate(photos):
        subject_config = replace(
            config, sampling=replace(sampling, seed=sampling.seed + num_candidates * i)
        )
        loras.append(
            generate_candidates(
                model, model.encode_photos(p[None]), [SubjectPhotos(p)], subject_config, 1, reranker
            )[0][0]
        )
    return LoraWeights.stack(loras)


def _measure_generation(generate_fn: Callable[[], LoraWeights]) -> tuple[LoraWeights, float]:
    start_time = time.perf_counter()
    weights = generate_fn()
    return weights, (time.perf_counter() - start_time) / len(weights)
