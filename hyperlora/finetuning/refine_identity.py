"""Refine LoRAs by who is recognised in their own pictures: an identity loss, which needs no further photo."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.cpu import quick_attention
from hyperlora.data.images import to_tensor
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.diffusion.lora_injection import injected
from hyperlora.diffusion.losses import clean_for, noised
from hyperlora.diffusion.text_to_image import render
from hyperlora.encoders.identity_embedder import Identity
from hyperlora.finetuning.examples import Examples
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track


def refine_identity(
    base: Base,
    predicted: LoraWeights,
    photos: Tensor,
    identity: Identity,
    prompts: Sequence[str],
    *,
    steps: int = 40,
    rank: int | None = None,
    out_rank: int | None = None,
    lr: float = 1e-3,
    batch: int = 4,
    keep: float = 0.5,
    seed: int = 0,
    label: str | None = None,
    watch: Callable[[int], None] | None = None,
) -> LoraWeights:
    """Fit a LoRA of ``rank`` (that of ``predicted`` unless given) above ``predicted`` (batch K) so that pictures drawn
    with both show whom ``photos`` [K, views, 3, h, w] in [0, 1] show; merged by SVD to ``out_rank``.

    Pictures are drawn under ``prompts`` first. Each step noises ``batch`` of them and decodes what the denoiser expects
    behind the noise; the loss is 1 - cos(identity of that, of the photos), as identity losses are taken of one step
    (PuLID, 2404.16022, §3.2), plus ``keep`` times the squared distance, in latents, from what it expects with
    ``predicted`` alone, which holds all that the prompt asked for. The same arguments give the same LoRAs; ``watch`` is
    told every step, as in ``fit``.
    """
    k, layout = len(photos), predicted.layout.with_rank(rank or predicted.layout.rank)
    who, own = identity.of(photos), _own_pictures(base, predicted, prompts, seed)
    std = (sum(s.fan_in for s in layout.sites) / len(layout.sites)) ** -0.5
    schedule = base.noise_schedule
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        codes = LoraWeights.zeros(layout, (), std).flatten().to(photos.device).repeat(k, 1).requires_grad_()
    optimizer = torch.optim.Adam([codes], lr)
    earliest, latest = (int(share * schedule.config.num_train_timesteps) for share in (0.2, 0.9))
    for step in track(range(1, steps + 1), label, "steps", steps) if label else range(1, steps + 1):
        if watch is not None:
            watch(step)
        clean, conditions = own.pick(torch.randint(len(prompts), (batch, k), generator=generator).to(photos.device))
        timesteps = torch.randint(earliest, latest, (len(clean),), generator=generator).to(clean.device)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        x, _ = noised(schedule, clean, noise, timesteps)
        with torch.no_grad():
            before = _expected(base, predicted, x, timesteps, conditions)
        with quick_attention(x, x[0, 0].numel()):
            now = _expected(base, predicted + LoraWeights.unflatten(layout, codes), x, timesteps, conditions)
            alike = (identity(base.decode_latents(now)) * who.repeat(batch, 1)).sum(-1)
        loss = 1 - alike + keep * F.mse_loss(now, before, reduction="none").mean((1, 2, 3))
        (codes.grad,) = torch.autograd.grad(loss.view(batch, k).mean(0).sum(), codes)
        optimizer.step()
    refined = predicted + LoraWeights.unflatten(layout, codes.detach())
    return refined.resize(out_rank or predicted.layout.rank)


def _expected(base: Base, lora: LoraWeights, x: Tensor, timesteps: Tensor, told: dict[str, Any]) -> Tensor:
    """The clean latents that the denoiser with ``lora`` expects behind ``x``."""
    with injected(base.denoiser, lora):
        return clean_for(base.noise_schedule, x, base.denoiser(x, timesteps, **told).sample, timesteps)


@torch.no_grad()
def _own_pictures(base: Base, lora: LoraWeights, prompts: Sequence[str], seed: int, steps: int = 6) -> Examples:
    """What each LoRA draws under each of the prompts."""
    n, size, latents = len(prompts), base.resolution, []
    for i in range(len(lora)):
        drawn = render(base, prompts, lora[[i] * n], seeds=range(seed, seed + n), steps=steps)
        latents.append(base.encode_images(torch.stack([to_tensor(p, size) for p in drawn])))
    text = base.encode_prompts(list(prompts))
    one = Examples(latents[0][None], _told(text))
    return Examples(torch.stack(latents), one.shared(len(lora)).conditions)


def _told(conditions: dict[str, Any]) -> dict[str, Any]:
    """[n, ...] to [1, n, ...], nested as it is."""
    return {k: _told(v) if isinstance(v, dict) else v[None] for k, v in conditions.items()}
