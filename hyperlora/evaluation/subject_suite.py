"""The table of a model: its LoRAs and every control (no LoRA, mean, shuffled, fitted, strengths, views)."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from hyperlora.data.images import pixels_of
from hyperlora.diffusion.text_to_image import render
from hyperlora.evaluation.subject_evaluator import Judge, Row
from hyperlora.finetuning.examples import Examples
from hyperlora.finetuning.refine import photo_examples
from hyperlora.finetuning.trainer import fit
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.generate import Photos, Settings, candidates
from hyperlora.pipelines.image_to_lora_base import PhotoModel, Sampling
from hyperlora.pipelines.refine_generated import refined
from hyperlora.pipelines.rerank import Chooser

NO_LORA: Final = "base, no LoRA"


@dataclass(frozen=True)
class FitSettings:
    """A LoRA fitted per subject on its one photo, the model's sites and rank: Adam, with prior preservation on
    ``prior_images`` pictures that the base itself draws of the class."""

    steps: int = 300
    lr: float = 1e-3
    batch: int = 2
    prior_weight: float = 1.0
    prior_images: int = 32
    chunk: int = 16


def rows(judge: Judge, model: PhotoModel, **options: Any) -> Iterator[Row]:
    """Score the base and ``rows_of`` the model, which takes the ``options``."""
    yield judge.row(NO_LORA, None)
    yield from rows_of(judge, model, **options)


def rows_of(
    judge: Judge,
    model: PhotoModel,
    *,
    strengths: tuple[float, ...] = (0.6, 0.8),
    refine_steps: int = 0,
    fitting: FitSettings | None = None,
    sampling: Sampling | None = None,
    best_of: int = 1,
    chooser: Chooser | None = None,
) -> Iterator[Row]:
    """Score the model from one photo and from all, its controls and, if asked, refined and fitted LoRAs, and the
    likest of ``best_of`` samples (as ``chooser`` finds)."""
    photos = judge.benchmark.photos
    one = photos[:, :1]
    lora, seconds = _timed(lambda: one_by_one(model, one, sampling))
    yield judge.row("one photo", lora, seconds)
    for strength in strengths:
        yield judge.row(f"one photo, strength {strength:g}", lora * strength, seconds)
    if photos.shape[1] > 1:
        many, seconds = _timed(lambda: one_by_one(model, photos, sampling))
        yield judge.row(f"{photos.shape[1]} photos", many, seconds)
    if best_of > 1:
        best, took = _timed(lambda: _best(model, one, sampling or Sampling(), best_of, chooser))
        yield judge.row(f"one photo, best of {best_of}", best, took)
    if len(lora) > 1:  # of a single subject these would be its own
        yield judge.row("shuffled: another's LoRA", lora[torch.arange(len(lora)).roll(1)])
        yield judge.row("mean LoRA", lora.mean())
    if refine_steps:
        finer, took = _timed(lambda: refined(model, judge.base, lora, one, steps=refine_steps, label="refining"))
        yield judge.row(f"one photo, refined {refine_steps} steps", finer, took)
    if fitting is not None:
        fitted, took = _timed(lambda: fitted_loras(judge, model, one, fitting)[fitting.steps])
        yield judge.row(f"fitted per subject, {fitting.steps} steps", fitted, took)


def fitted_loras(
    judge: Judge, model: PhotoModel, photos: Tensor, settings: FitSettings, snapshots: Sequence[int] = ()
) -> dict[int, LoraWeights]:
    """DreamBooth-LoRA per subject, ``settings.chunk`` subjects at once; by number of steps: each of ``snapshots``, and
    ``settings.steps``."""
    base, layout = judge.base, model.layout
    trigger = model.card.get("trigger_phrase", "sks person")
    prior = _prior(judge, settings) if settings.prior_weight else None
    std = (sum(s.fan_in for s in layout.sites) / len(layout.sites)) ** -0.5
    wanted = sorted({*snapshots, settings.steps})
    parts: dict[int, list[Tensor]] = {n: [] for n in wanted}
    for chunk in photos.split(settings.chunk):
        examples = photo_examples(base, chunk, f"a portrait of {trigger}")
        start = LoraWeights.zeros(layout, (len(chunk),), std).flatten()
        done = fit(
            base.denoiser, base.noise_schedule, examples, start, partial(LoraWeights.unflatten, layout),
            steps=settings.steps, lr=settings.lr, batch=settings.batch, prior_weight=settings.prior_weight,
            prior=prior.shared(len(chunk)) if prior else None, snapshots=wanted, label="fitting",
        )  # fmt: skip
        for n in wanted:
            parts[n].append(done.snapshots[n].flatten())
    return {n: LoraWeights.unflatten(layout, torch.cat(flat)) for n, flat in parts.items()}


def _prior(judge: Judge, settings: FitSettings) -> Examples:
    prompt = "a portrait of a person"
    n = settings.prior_images
    pictures = render(judge.base, [prompt] * n, seeds=range(n), steps=judge.steps, guidance=judge.guidance)
    return photo_examples(judge.base, pixels_of(pictures)[None], prompt)


def one_by_one(model: PhotoModel, photos: Tensor, sampling: Sampling | None = None) -> LoraWeights:
    """Single forward passes, as a user makes them, so that the time per LoRA is honest; each by a seed of its own."""
    how = sampling or Sampling()
    with torch.no_grad():
        made = [model.forward(p[None], replace(how, seed=how.seed + i))[0] for i, p in enumerate(photos)]
    return LoraWeights.stack(made)


def _best(
    model: PhotoModel, photos: Tensor, sampling: Sampling, best_of: int, chooser: Chooser | None
) -> LoraWeights:  # fmt: skip
    settings, made = Settings(best_of=best_of), []
    for i, p in enumerate(photos):
        how = replace(settings, sampling=replace(sampling, seed=sampling.seed + best_of * i))
        made.append(candidates(model, model.features(p[None]), [Photos(p)], how, 1, chooser)[0][0])
    return LoraWeights.stack(made)


def _timed(make: Callable[[], LoraWeights]) -> tuple[LoraWeights, float]:
    began = time.perf_counter()
    weights = make()
    return weights, (time.perf_counter() - began) / len(weights)
