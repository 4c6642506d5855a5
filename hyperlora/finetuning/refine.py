"""A few steps above the predicted LoRA: rank-relaxed fast fine-tuning (2307.06949, §4.3), or what suits the model."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import Base
from hyperlora.finetuning.examples import Examples
from hyperlora.finetuning.trainer import fit
from hyperlora.lora.weights import LoraWeights


def refine(
    base: Base,
    predicted: LoraWeights,
    photos: Tensor,
    *,
    steps: int = 40,
    rank: int = 8,
    out_rank: int | None = None,
    lr: float = 1e-3,
    batch: int = 4,
    prompt: str = "a portrait of sks person",
    seed: int = 0,
    label: str | None = None,
    watch: Callable[[int], None] | None = None,
) -> LoraWeights:
    """``predicted`` (batch K) stays frozen, a LoRA of larger ``rank`` starting at zero is fitted above it with the
    diffusion loss on ``photos`` [K, views, 3, h, w] in [0, 1], and both are merged by SVD to ``out_rank`` (default:
    the predicted rank). The same arguments give the same LoRA. ``watch`` is told every step, as in ``fit``."""
    k = len(photos)
    layout = predicted.layout.with_rank(rank)
    examples = photo_examples(base, photos, prompt)
    std = (sum(s.fan_in for s in layout.sites) / len(layout.sites)) ** -0.5
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        start = LoraWeights.zeros(layout, (), std).flatten().to(photos.device).expand(k, -1)
        fitted = fit(
            base.denoiser, base.noise_schedule, examples, start, partial(LoraWeights.unflatten, layout),
            steps=steps, lr=lr, batch=batch, frozen=predicted, label=label, watch=watch,
        )  # fmt: skip
    return (predicted + fitted.weights).resize(out_rank or predicted.layout.rank)


def photo_examples(base: Base, photos: Tensor, prompt: str) -> Examples:
    """Photos [K, n, 3, h, w] all under one prompt."""
    k, n = photos.shape[:2]
    size = base.resolution
    flat = photos.flatten(0, 1)
    if flat.shape[-2:] != (size, size):
        flat = torch.nn.functional.interpolate(flat, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    text = base.encode_prompts([prompt])
    return Examples(base.encode_images(flat).unflatten(0, (k, n)), _for_all(text, k, n))


def _for_all(conditions: dict[str, Tensor], k: int, n: int) -> dict[str, Tensor]:
    def spread(value: Tensor) -> Tensor:
        return value[None].expand(k, n, *value.shape[1:])

    return {
        name: {i: spread(v) for i, v in value.items()} if isinstance(value, dict) else spread(value)
        for name, value in conditions.items()
    }
