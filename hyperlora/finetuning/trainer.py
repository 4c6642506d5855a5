"""Fit LoRAs to photos: K subjects at a time on one frozen base, each as if it were alone."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperlora.diffusion.lora_injection import injected
from hyperlora.diffusion.losses import denoising_loss
from hyperlora.errors import BadRequest
from hyperlora.finetuning.examples import Chance, Examples, Probe
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track

__all__ = ["Chance", "Examples", "Fitted", "Probe", "fit"]


@dataclass(frozen=True)
class Fitted:
    """``codes`` [K, P] as fitted, ``weights`` they expand to (batch K), ``losses`` [steps, K] (as many steps as the
    longest took); ``snapshots`` their
    state after as many steps as were asked for. ``looks`` [n, K] are the losses on the probe's draws, the first before
    any step, and ``taken`` [K] the steps of each subject. Losses and looks are NaN once a subject has ended."""

    codes: Tensor
    weights: LoraWeights
    losses: Tensor
    snapshots: Mapping[int, LoraWeights]
    looks: Tensor
    taken: Tensor


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
    shift: float = 1.0,
    seeds: Sequence[int] | None = None,
    probe: Probe | None = None,
    label: str | None = None,
    watch: Callable[[int], None] | None = None,
) -> Fitted:
    """Adam on K LoRAs at once. ``start`` [K, P] are the codes to begin with and ``expand`` their expansion to weights:
    ``partial(LoraWeights.unflatten, layout)`` for plain LoRA, a parametrisation for LiDB.

    ``prior`` holds class images for DreamBooth's prior preservation (2208.12242, eq. 2); ``frozen`` weights (batch K)
    stay added below the fitted ones, as rank-relaxed fine-tuning needs. Subjects do not influence each other; with
    ``seeds`` (one each) neither does what chance decides for them. With ``twins`` = t, subjects i, i + K/t, i + 2K/t...
    get the same timesteps and noise, so that they differ by their examples alone. ``changes`` [K, n, c, h, w] are edits
    the LoRAs should make on the examples, ``shift`` is of timesteps, both as ``denoising_loss`` takes them. ``probe``
    follows each subject's loss and may end it early. ``watch`` is told the number of every step before it and may raise
    to end them.
    """
    if seeds is not None and twins > 1:
        raise BadRequest("twins share what chance decides, seeds keep it apart: give one of them")
    k = len(start)
    going = torch.arange(k, device=start.device)
    codes = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([codes], lr)
    chance = None if seeds is None else Chance(seeds)
    course = _Course(start.detach(), probe is not None)
    losses, kept = [], {}

    def lora() -> LoraWeights:
        return expand(codes) if frozen is None else _of(frozen, going) + expand(codes)

    def look(step: int) -> None:
        assert probe is not None
        with torch.no_grad(), injected(denoiser, lora()):
            course.look(going, codes, _probed(denoiser, scheduler, probe, going), step)

    if probe is not None:
        look(0)
    for step in track(range(1, steps + 1), label, "steps", steps) if label else range(1, steps + 1):
        if watch is not None:
            watch(step)
        with injected(denoiser, lora()):
            loss = _loss(denoiser, scheduler, examples, batch, going, twins, changes, shift, chance)
            if prior is not None:
                again = _loss(denoiser, scheduler, prior, batch, going, twins, None, shift, chance)
                loss = loss + prior_weight * again
        (codes.grad,) = torch.autograd.grad(loss.sum(), codes)
        optimizer.step()
        losses.append(_spread(loss.detach(), going, k))
        course.taken[going] = step
        if step in snapshots:
            kept[step] = expand(course.now(going, codes).clone())
        if probe is not None and (step % probe.every == 0 or step == steps):
            look(step)
            on = course.goes_on(going, probe.patience)
            if not on.all():
                course.now(going, codes)
                going, codes, optimizer = going[on], *_fewer(codes, optimizer, on)
            if not len(going):
                break
    final = course.now(going, codes) if course.best_codes is None else course.best_codes
    return Fitted(
        final, expand(final), torch.stack(losses) if losses else torch.zeros(0, k), kept,
        torch.stack(course.looks) if course.looks else torch.zeros(0, k), course.taken,
    )  # fmt: skip


class _Course:
    """Where each of the K subjects stands, and with ``followed`` what it was at its best look."""

    def __init__(self, start: Tensor, followed: bool) -> None:
        k, device = len(start), start.device
        self.codes = start.clone()
        self.best_codes = start.clone() if followed else None
        self.best = torch.full((k,), torch.inf, device=device)
        self.taken, self.worse = (torch.zeros(k, dtype=torch.long, device=device) for _ in range(2))
        self.looks: list[Tensor] = []

    def now(self, going: Tensor, codes: Tensor) -> Tensor:
        """The codes [K, P] of all, those of ``going`` as they are."""
        self.codes[going] = codes.detach()
        return self.codes

    def look(self, going: Tensor, codes: Tensor, losses: Tensor, step: int) -> None:
        better = (losses < self.best[going]) | (step == 0)
        self.best[going] = torch.where(better, losses, self.best[going])
        if self.best_codes is not None:
            self.best_codes[going[better]] = codes.detach()[better]
        self.worse[going] = torch.where(better, 0, self.worse[going] + 1)
        self.looks.append(_spread(losses, going, len(self.codes)))

    def goes_on(self, going: Tensor, patience: int | None) -> Tensor:
        return torch.ones_like(going, dtype=torch.bool) if patience is None else self.worse[going] < patience


def _loss(
    denoiser: nn.Module, scheduler: Any, examples: Examples, batch: int, going: Tensor, twins: int,
    changes: Tensor | None, shift: float, chance: Chance | None,
) -> Tensor:  # fmt: skip
    """Mean loss over ``batch`` random examples, per subject [k]."""
    device, k, draw = examples.latents.device, len(going), None
    if chance is not None:
        choice, draw = chance.draw(examples, batch, going)
    else:
        choice = torch.randint(examples.latents.shape[1], (batch, k // twins), device=device).repeat(1, twins)
        if examples.counts is not None:
            choice %= torch.tensor(examples.counts, device=device)[going]
    latents, conditions = examples.pick(choice, going)
    if twins > 1:
        u = torch.rand(batch, k // twins, device=device).repeat(1, twins).flatten()
        noise = torch.randn(batch, k // twins, *latents.shape[1:], device=device)
        draw = u, noise.repeat(1, twins, *[1] * (latents.ndim - 1)).flatten(0, 1)
    change = None if changes is None else Examples(changes, {}).pick(choice, going)[0]
    loss = denoising_loss(denoiser, scheduler, latents, shift=shift, draw=draw, change=change, **conditions)
    return loss.view(batch, k).mean(0)


def _probed(denoiser: nn.Module, scheduler: Any, probe: Probe, going: Tensor) -> Tensor:
    """Mean loss over the probe's draws, per subject [k]."""
    parts = []
    for choice, u, noise in zip(probe.choice, probe.u, probe.noise, strict=True):
        latents, conditions = probe.examples.pick(choice[going][None], going)
        parts.append(denoising_loss(denoiser, scheduler, latents, draw=(u[going], noise[going]), **conditions))
    return torch.stack(parts).mean(0)


def _fewer(codes: Tensor, optimizer: torch.optim.Adam, on: Tensor) -> tuple[Tensor, torch.optim.Adam]:
    """The rows ``on`` of the codes, and Adam as it would stand had there been no others."""
    fewer = codes.detach()[on].requires_grad_()
    again = torch.optim.Adam([fewer], optimizer.param_groups[0]["lr"])
    again.state[fewer] = {k: v[on] if v.ndim else v for k, v in optimizer.state[codes].items()}
    return fewer, again


def _of(frozen: LoraWeights, going: Tensor) -> LoraWeights:
    return frozen if len(going) == len(frozen) else frozen[going]


def _spread(values: Tensor, going: Tensor, k: int) -> Tensor:
    """[k] per subject still fitted to [K], NaN for the others."""
    return torch.full((k,), torch.nan, device=values.device, dtype=values.dtype).index_copy(0, going, values)
