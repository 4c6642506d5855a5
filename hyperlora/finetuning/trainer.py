"""Fit LoRAs to photos: K subjects at a time on one frozen base, each as if it were alone."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.examples import SubjectRng, TrainingExamples, ValidationProbe
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track

__all__ = ["FineTuneResult", "SubjectRng", "TrainingExamples", "ValidationProbe", "fine_tune_loras"]


@dataclass(frozen=True)
class FineTuneResult:
    """``fit_lidb_targets`` [K, P] as fitted, ``weights`` they expand to (batch K), ``losses`` [steps, K] (as many steps as the
    longest took); ``snapshot_steps`` their
    state after as many steps as were asked for. ``val_losses`` [n, K] are the losses on the probe's draws, the first before
    any step, and ``num_steps`` [K] the steps of each subject. Losses and looks are NaN once a subject has ended."""

    codes: Tensor
    weights: LoraWeights
    losses: Tensor
    snapshots: Mapping[int, LoraWeights]
    val_losses: Tensor
    num_steps: Tensor


def fine_tune_loras(
    denoiser: nn.Module,
    scheduler: Any,
    examples: TrainingExamples,
    init_codes: Tensor,
    decode_codes: Callable[[Tensor], LoraWeights],
    *,
    num_steps: int,
    lr: float,
    batch_size: int = 1,
    prior_examples: TrainingExamples | None = None,
    prior_loss_weight: float = 1.0,
    base_loras: LoraWeights | None = None,
    snapshot_steps: Collection[int] = (),
    num_paired_groups: int = 1,
    x0_offsets: Tensor | None = None,
    shift: float = 1.0,
    seeds: Sequence[int] | None = None,
    probe: ValidationProbe | None = None,
    progress_label: str | None = None,
    on_step: Callable[[int], None] | None = None,
) -> FineTuneResult:
    """Adam on K LoRAs at once. ``init_codes`` [K, P] are the codes to begin with and ``decode_codes`` their expansion to weights:
    ``partial(LoraWeights.unflatten, layout)`` for plain LoRA, a parametrisation for LiDB.

    ``prior_examples`` holds class images for DreamBooth's prior preservation (2208.12242, eq. 2); ``base_loras`` weights (batch K)
    stay added below the fitted ones, as rank-relaxed fine-tuning needs. Subjects do not influence each other; with
    ``seeds`` (one each) neither does what chance decides for them. With ``num_paired_groups`` = t, subjects i, i + K/t, i + 2K/t...
    get the same timesteps and noise, so that they differ by their examples alone. ``x0_offsets`` [K, n, c, h, w] are edits
    the LoRAs should make on the examples, ``shift`` is of timesteps, both as ``compute_denoising_loss`` takes them. ``probe``
    follows each subject's loss and may end it early. ``on_step`` is told the number of every step before it and may raise
    to end them.
    """
    if seeds is not None and num_paired_groups > 1:
        raise InvalidArgumentError(
            "twins share what chance decides, seeds keep it apart: give one of them"
        )
    k = len(init_codes)
    active = torch.arange(k, device=init_codes.device)
    codes = init_codes.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([codes], lr)
    rng = None if seeds is None else SubjectRng(seeds)
    early_stopping = _EarlyStopping(init_codes.detach(), probe is not None)
    losses, saved_loras = [], {}

    def build_loras() -> LoraWeights:
        return (
            decode_codes(codes)
            if base_loras is None
            else _select_base_loras(base_loras, active) + decode_codes(codes)
        )

    def validate_step(step: int) -> None:
        assert probe is not None
        with torch.no_grad(), inject_lora(denoiser, build_loras()):
            early_stopping.update_best(
                active, codes, _compute_val_losses(denoiser, scheduler, probe, active), step
            )

    if probe is not None:
        validate_step(0)
    for step in (
        track(range(1, num_steps + 1), progress_label, "steps", num_steps)
        if progress_label
        else range(1, num_steps + 1)
    ):
        if on_step is not None:
            on_step(step)
        with inject_lora(denoiser, build_loras()):
            loss = _compute_loss(
                denoiser,
                scheduler,
                examples,
                batch_size,
                active,
                num_paired_groups,
                x0_offsets,
                shift,
                rng,
            )
            if prior_examples is not None:
                prior_loss = _compute_loss(
                    denoiser,
                    scheduler,
                    prior_examples,
                    batch_size,
                    active,
                    num_paired_groups,
                    None,
                    shift,
                    rng,
                )
                loss = loss + prior_loss_weight * prior_loss
        (codes.grad,) = torch.autograd.grad(loss.sum(), codes)
        optimizer.step()
        losses.append(_scatter_to_subjects(loss.detach(), active, k))
        early_stopping.num_steps[active] = step
        if step in snapshot_steps:
            saved_loras[step] = decode_codes(early_stopping.update_codes(active, codes).clone())
        if probe is not None and (step % probe.eval_every == 0 or step == num_steps):
            validate_step(step)
            active_mask = early_stopping.is_active(active, probe.patience)
            if not active_mask.all():
                early_stopping.update_codes(active, codes)
                active, codes, optimizer = (
                    active[active_mask],
                    *_select_active(codes, optimizer, active_mask),
                )
            if not len(active):
                break
    final_codes = (
        early_stopping.update_codes(active, codes)
        if early_stopping.best_codes is None
        else early_stopping.best_codes
    )
    return FineTuneResult(
        final_codes,
        decode_codes(final_codes),
        torch.stack(losses) if losses else torch.zeros(0, k),
        saved_loras,
        torch.stack(early_stopping.val_losses) if early_stopping.val_losses else torch.zeros(0, k),
        early_stopping.num_steps,
    )


class _EarlyStopping:
    """Where each of the K subjects stands, and with ``track_best`` what it was at its best look."""

    def __init__(self, init_codes: Tensor, track_best: bool) -> None:
        k, device = len(init_codes), init_codes.device
        self.codes = init_codes.clone()
        self.best_codes = init_codes.clone() if track_best else None
        self.best_losses = torch.full((k,), torch.inf, device=device)
        self.num_steps, self.num_bad_checks = (
            torch.zeros(k, dtype=torch.long, device=device) for _ in range(2)
        )
        self.val_losses: list[Tensor] = []

    def update_codes(self, active: Tensor, codes: Tensor) -> Tensor:
        """The codes [K, P] of all, those of ``active`` as they are."""
        self.codes[active] = codes.detach()
        return self.codes

    def update_best(self, active: Tensor, codes: Tensor, losses: Tensor, step: int) -> None:
        improved = (losses < self.best_losses[active]) | (step == 0)
        self.best_losses[active] = torch.where(improved, losses, self.best_losses[active])
        if self.best_codes is not None:
            self.best_codes[active[improved]] = codes.detach()[improved]
        self.num_bad_checks[active] = torch.where(improved, 0, self.num_bad_checks[active] + 1)
        self.val_losses.append(_scatter_to_subjects(losses, active, len(self.codes)))

    def is_active(self, active: Tensor, patience: int | None) -> Tensor:
        return (
            torch.ones_like(active, dtype=torch.bool)
            if patience is None
            else self.num_bad_checks[active] < patience
        )


def _compute_loss(
    denoiser: nn.Module,
    scheduler: Any,
    examples: TrainingExamples,
    batch_size: int,
    active: Tensor,
    num_paired_groups: int,
    x0_offsets: Tensor | None,
    shift: float,
    rng: SubjectRng | None,
) -> Tensor:
    """Mean loss over ``batch_size`` random examples, per subject [k]."""
    device, k, noise_sample = examples.latents.device, len(active), None
    if rng is not None:
        indices, noise_sample = rng.sample_batch(examples, batch_size, active)
    else:
        indices = torch.randint(
            examples.latents.shape[1], (batch_size, k // num_paired_groups), device=device
        ).repeat(1, num_paired_groups)
        if examples.num_examples is not None:
            indices %= torch.tensor(examples.num_examples, device=device)[active]
    latents, conditions = examples.gather_examples(indices, active)
    if num_paired_groups > 1:
        u = (
            torch.rand(batch_size, k // num_paired_groups, device=device)
            .repeat(1, num_paired_groups)
            .flatten()
        )
        noise = torch.randn(batch_size, k // num_paired_groups, *latents.shape[1:], device=device)
        noise_sample = (
            u,
            noise.repeat(1, num_paired_groups, *[1] * (latents.ndim - 1)).flatten(0, 1),
        )
    x0_offset = (
        None
        if x0_offsets is None
        else TrainingExamples(x0_offsets, {}).gather_examples(indices, active)[0]
    )
    loss = compute_denoising_loss(
        denoiser,
        scheduler,
        latents,
        shift=shift,
        noise_sample=noise_sample,
        x0_offset=x0_offset,
        **conditions,
    )
    return loss.view(batch_size, k).mean(0)


def _compute_val_losses(
    denoiser: nn.Module, scheduler: Any, probe: ValidationProbe, active: Tensor
) -> Tensor:
    """Mean loss over the probe's draws, per subject [k]."""
    losses = []
    for indices, u, noise in zip(probe.indices, probe.u, probe.noise, strict=True):
        latents, conditions = probe.examples.gather_examples(indices[active][None], active)
        losses.append(
            compute_denoising_loss(
                denoiser, scheduler, latents, noise_sample=(u[active], noise[active]), **conditions
            )
        )
    return torch.stack(losses).mean(0)


def _select_active(
    codes: Tensor, optimizer: torch.optim.Adam, active_mask: Tensor
) -> tuple[Tensor, torch.optim.Adam]:
    """The rows ``active_mask`` of the codes, and Adam as it would stand had there been no others."""
    active_codes = codes.detach()[active_mask].requires_grad_()
    active_optimizer = torch.optim.Adam([active_codes], optimizer.param_groups[0]["lr"])
    active_optimizer.state[active_codes] = {
        k: v[active_mask] if v.ndim else v for k, v in optimizer.state[codes].items()
    }
    return active_codes, active_optimizer


def _select_base_loras(base_loras: LoraWeights, active: Tensor) -> LoraWeights:
    return base_loras if len(active) == len(base_loras) else base_loras[active]


def _scatter_to_subjects(values: Tensor, active: Tensor, num_subjects: int) -> Tensor:
    """[k] per subject still fitted to [K], NaN for the others."""
    return torch.full(
        (num_subjects,), torch.nan, device=values.device, dtype=values.dtype
    ).index_copy(0, active, values)
