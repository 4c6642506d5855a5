"""Fit LoRAs to photos: K subjects at a time on one frozen base, each as if it were alone."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperlora.adapters import injected
from hyperlora.lora import LoraWeights
from hyperlora.objectives import denoising_loss
from hyperlora.progress import track


@dataclass(frozen=True)
class Examples:
    """What K subjects are fitted to: ``latents`` [K, n, c, h, w] and what the denoiser is told about each
    (``encoder_hidden_states`` [K, n, tokens, width], maybe more, nested as the denoiser takes it)."""

    latents: Tensor
    conditions: Mapping[str, Any]

    def pick(self, choice: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Examples ``choice`` [b, K] as one batch of b * K, example j of subject i at j * K + i."""
        subject = torch.arange(choice.shape[1], device=choice.device).expand_as(choice)

        def picked(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {k: picked(v) for k, v in value.items()}
            return value[subject, choice].flatten(0, 1)

        return picked(self.latents), picked(self.conditions)


@dataclass(frozen=True)
class Fitted:
    """``codes`` [K, P] as fitted, ``weights`` they expand to (batch K), ``losses`` [steps, K]; ``snapshots`` their
    state after as many steps as were asked for."""

    codes: Tensor
    weights: LoraWeights
    losses: Tensor
    snapshots: Mapping[int, LoraWeights]


def fit(
    denoiser: nn.Module,
    scheduler: Any,
    examples: Examples,
    start: Tensor,
    expand: Callable[[Tensor], LoraWeights],
    *,
    steps: int,
    lr: float,
    batch: int = 1,
    prior: Examples | None = None,
    prior_weight: float = 1.0,
    frozen: LoraWeights | None = None,
    snapshots: Collection[int] = (),
    twins: int = 1,
    changes: Tensor | None = None,
    label: str | None = None,
    watch: Callable[[int], None] | None = None,
) -> Fitted:
    """Adam on K LoRAs at once. ``start`` [K, P] are the codes to begin with and ``expand`` their expansion to weights:
    ``partial(LoraWeights.unflatten, layout)`` for plain LoRA, a parametrisation for LiDB.

    ``prior`` holds class images for DreamBooth's prior preservation (2208.12242, eq. 2); ``frozen`` weights (batch K)
    stay added below the fitted ones, as rank-relaxed fine-tuning needs. Subjects do not influence each other. With
    ``twins`` = t, subjects i, i + K/t, i + 2K/t... get the same timesteps and noise, so that they differ by their
    examples alone. ``changes`` [K, n, c, h, w] are edits the LoRAs should make on the examples, as
    ``denoising_loss`` takes them. ``watch`` is told the number of every step before it and may raise to end them.
    """
    codes = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([codes], lr)
    k, losses, kept = len(start), [], {}
    for step in track(range(1, steps + 1), label, "steps", steps) if label else range(1, steps + 1):
        if watch is not None:
            watch(step)
        weights = expand(codes)
        if frozen is not None:
            weights = frozen + weights
        with injected(denoiser, weights):
            loss = _loss(denoiser, scheduler, examples, batch, k, twins, changes)
            if prior is not None:
                loss = loss + prior_weight * _loss(denoiser, scheduler, prior, batch, k, twins)
        (gradient,) = torch.autograd.grad(loss.sum(), codes)
        codes.grad = gradient
        optimizer.step()
        losses.append(loss.detach())
        if step in snapshots:
            kept[step] = expand(codes.detach().clone())
    codes = codes.detach()
    return Fitted(codes, expand(codes), torch.stack(losses) if losses else torch.zeros(0, k), kept)


def _loss(
    denoiser: nn.Module, scheduler: Any, examples: Examples, batch: int, k: int, twins: int,
    changes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    device = examples.latents.device
    choice = torch.randint(examples.latents.shape[1], (batch, k // twins), device=device).repeat(1, twins)
    latents, conditions = examples.pick(choice)
    draw = None
    if twins > 1:
        u = torch.rand(batch, k // twins, device=device).repeat(1, twins).flatten()
        noise = torch.randn(batch, k // twins, *latents.shape[1:], device=device)
        draw = u, noise.repeat(1, twins, *[1] * (latents.ndim - 1)).flatten(0, 1)
    change = None if changes is None else Examples(changes, {}).pick(choice)[0]
    return denoising_loss(denoiser, scheduler, latents, draw=draw, change=change, **conditions).view(batch, k).mean(0)
