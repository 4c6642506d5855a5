"""A few steps above the predicted LoRA: rank-relaxed fast fine-tuning (2307.06949, §4.3), or what suits the model."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.weights import LoraWeights


def refine(
    base: DiffusionBase,
    predicted: LoraWeights,
    photos: Tensor,
    *,
    num_steps: int = 40,
    rank: int = 8,
    out_rank: int | None = None,
    lr: float = 1e-3,
    batch_size: int = 4,
    prompt: str = "a portrait of sks person",
    seed: int = 0,
    progress_label: str | None = None,
    on_step: Callable[[int], None] | None = None,
) -> LoraWeights:
    """``predict_loras`` (batch K) stays frozen, a LoRA of larger ``rank`` starting at zero is fitted above it with the
    diffusion loss on ``load_photos`` [K, views, 3, h, w] in [0, 1], and both are merged by SVD to ``out_rank`` (default:
    the predicted rank). The same arguments give the same LoRA. ``on_step`` is told every step, as in ``fine_tune_loras``."""
    k = len(photos)
    layout = predicted.layout.with_rank(rank)
    examples = make_photo_examples(base, photos, prompt)
    init_std = (sum(s.in_features for s in layout.targets) / len(layout.targets)) ** -0.5
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        init_codes = (
            LoraWeights.zeros(layout, (), init_std).flatten().to(photos.device).expand(k, -1)
        )
        result = fine_tune_loras(
            base.denoiser,
            base.noise_scheduler,
            examples,
            init_codes,
            partial(LoraWeights.unflatten, layout),
            num_steps=num_steps,
            lr=lr,
            batch_size=batch_size,
            base_loras=predicted,
            progress_label=progress_label,
            on_step=on_step,
        )
    return (predicted + result.weights).resize(out_rank or predicted.layout.rank)


def make_photo_examples(base: DiffusionBase, photos: Tensor, prompt: str) -> TrainingExamples:
    """Photos [K, n, 3, h, w] all under one prompt."""
    k, n = photos.shape[:2]
    size = base.resolution
    pixels = photos.flatten(0, 1)
    if pixels.shape[-2:] != (size, size):
        pixels = torch.nn.functional.interpolate(
            pixels, (size, size), mode="bicubic", antialias=True
        ).clamp(0, 1)
    conditions = base.encode_prompts([prompt])
    return TrainingExamples(
        base.encode_images(pixels).unflatten(0, (k, n)), _expand_conditions(conditions, k, n)
    )


def _expand_conditions(
    conditions: dict[str, Tensor], num_subjects: int, num_examples: int
) -> dict[str, Tensor]:
    def expand_value(value: Tensor) -> Tensor:
        return value[None].expand(num_subjects, num_examples, *value.shape[1:])

    return {
        name: {i: expand_value(v) for i, v in value.items()}
        if isinstance(value, dict)
        else expand_value(value)
        for name, value in conditions.items()
    }
