"""Fine-tune the LoRAs of K subjects at a time on one frozen base, each independently."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.examples import (
    NoiseSample,
    SubjectRng,
    TrainingExamples,
    ValidationProbe,
    gather_rows,
)
from hyperlora.lora.weights import LoraWeights

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class FineTuneResult:
    """Result of ``fine_tune_loras`` for K subjects. Losses are NaN once a subject has stopped.

    Attributes:
        codes: The optimized codes [K, P].
        weights: The LoRAs they decode to, a batch [K].
        losses: Training losses [steps, K]; steps are those of the subject that ran longest.
        snapshots: The LoRAs after each step of ``snapshot_steps``.
        val_losses: Losses on the draws of the probe [validations, K], the first before any step.
        num_steps: Steps of each subject [K].
    """

    codes: Tensor
    weights: LoraWeights
    losses: Tensor
    snapshots: Mapping[int, LoraWeights]
    val_losses: Tensor
    num_steps: Tensor


def fine_tune_loras(
    denoiser: nn.Module,
    scheduler: "SchedulerMixin",
    examples: TrainingExamples,
    init_codes: Tensor,
    decode_codes: Callable[[Tensor], LoraWeights],
    config: FineTuneConfig,
    *,
    prior_examples: TrainingExamples | None = None,
    base_loras: LoraWeights | None = None,
    x0_offsets: Tensor | None = None,
    probe: ValidationProbe | None = None,
) -> FineTuneResult:
    """Fine-tune K LoRAs at once with Adam on the denoising loss, each independently.

    Args:
        denoiser: The frozen UNet or transformer.
        scheduler: Its noise scheduler.
        examples: The training examples of the K subjects.
        init_codes: Codes to start from [K, P].
        decode_codes: Maps codes [k, P] to LoRAs, a batch [k]. ``partial(LoraWeights.unflatten,
            layout)`` for plain LoRA, a parametrization for LiDB (2307.06949) and others.
        config: Steps, learning rate, seeds and further settings.
        prior_examples: Class images of prior preservation (DreamBooth, 2208.12242, eq. 2).
        base_loras: LoRAs [K] that stay added without being optimized, as rank-relaxed fine-tuning
            needs (2307.06949, §4.3).
        x0_offsets: Edits of the clean latents that the LoRAs are to make [K, n, c, h, w], see
            ``compute_denoising_loss``.
        probe: Validation draws; they choose the best codes and may stop a subject early.

    Returns:
        Codes, LoRAs and losses of all K subjects.
    """
    num_subjects = len(init_codes)
    active = torch.arange(num_subjects, device=init_codes.device)  # [k], subjects still optimized
    codes = init_codes.detach().clone().requires_grad_()  # [k, P]
    optimizer = torch.optim.Adam([codes], config.lr)
    rng = None if config.seeds is None else SubjectRng(config.seeds)
    early_stopping = _EarlyStopping(init_codes.detach(), probe is not None)
    losses: list[Tensor] = []  # [K] each
    snapshots: dict[int, LoraWeights] = {}

    def build_loras() -> LoraWeights:
        """Decode the current codes and add the frozen LoRAs."""
        loras = decode_codes(codes)
        return loras if base_loras is None else _select_base_loras(base_loras, active) + loras

    def validate_step(probe: ValidationProbe, step: int) -> None:
        """Compute the validation losses of the active subjects and record them."""
        with torch.no_grad(), inject_lora(denoiser, build_loras()):
            val_losses = _compute_val_losses(denoiser, scheduler, probe, active)  # [k]
        early_stopping.update_best(active, codes, val_losses, step)

    def compute_loss(examples: TrainingExamples, x0_offsets: Tensor | None = None) -> Tensor:
        """Compute the mean loss of each active subject [k] over a random batch."""
        indices, noise_sample = _sample_batch(examples, active, config, rng)
        latents, conditions = examples.gather_examples(indices, active)  # [b * k, c, h, w]
        loss = compute_denoising_loss(
            denoiser,
            scheduler,
            latents,
            shift=config.shift,
            noise_sample=noise_sample,
            x0_offset=None if x0_offsets is None else gather_rows(x0_offsets, indices, active),
            **conditions,
        )  # [b * k]
        return loss.view(config.batch_size, len(active)).mean(0)

    if probe is not None:
        validate_step(probe, 0)
    for step in config.iterate_steps():
        with inject_lora(denoiser, build_loras()):
            loss = compute_loss(examples, x0_offsets)  # [k]
            if prior_examples is not None:
                loss = loss + config.prior_loss_weight * compute_loss(prior_examples)
        # the sum over subjects gives each row of the codes the gradient of its own loss
        (codes.grad,) = torch.autograd.grad(loss.sum(), codes)
        optimizer.step()
        losses.append(_scatter_to_subjects(loss.detach(), active, num_subjects))
        early_stopping.num_steps[active] = step
        if step in config.snapshot_steps:
            snapshots[step] = decode_codes(early_stopping.update_codes(active, codes).clone())
        if probe is not None and (step % probe.eval_every == 0 or step == config.num_steps):
            validate_step(probe, step)
            active_mask = early_stopping.is_active(active, probe.patience)  # [k]
            if not active_mask.all():
                early_stopping.update_codes(active, codes)
                active = active[active_mask]
                codes, optimizer = _select_active(codes, optimizer, active_mask)
            if not len(active):
                break
    final_codes = (
        early_stopping.update_codes(active, codes)
        if early_stopping.best_codes is None
        else early_stopping.best_codes
    )  # [K, P]
    return FineTuneResult(
        codes=final_codes,
        weights=decode_codes(final_codes),
        losses=_stack_losses(losses, num_subjects),
        snapshots=snapshots,
        val_losses=_stack_losses(early_stopping.val_losses, num_subjects),
        num_steps=early_stopping.num_steps,
    )


class _EarlyStopping:
    """Codes, best codes and validation losses of all K subjects.

    Args:
        init_codes: Codes before the first step [K, P].
        track_best: Whether to keep the codes of the lowest validation loss.
    """

    def __init__(self, init_codes: Tensor, track_best: bool) -> None:
        num_subjects, device = len(init_codes), init_codes.device
        self.codes = init_codes.clone()  # [K, P]
        self.best_codes = init_codes.clone() if track_best else None  # [K, P]
        self.best_losses = torch.full((num_subjects,), torch.inf, device=device)  # [K]
        self.num_steps = torch.zeros(num_subjects, dtype=torch.long, device=device)  # [K]
        self.num_bad_checks = torch.zeros(num_subjects, dtype=torch.long, device=device)  # [K]
        self.val_losses: list[Tensor] = []  # [K] each

    def update_codes(self, active: Tensor, codes: Tensor) -> Tensor:
        """Store the codes [k, P] of the active subjects [k]; return those of all [K, P]."""
        self.codes[active] = codes.detach()
        return self.codes

    def update_best(self, active: Tensor, codes: Tensor, losses: Tensor, step: int) -> None:
        """Record one validation: losses [k] and codes [k, P] of the active subjects [k]."""
        best_losses = self.best_losses[active]  # [k]
        improved = (losses < best_losses) | (step == 0)  # [k]
        self.best_losses[active] = torch.where(improved, losses, best_losses)
        if self.best_codes is not None:
            self.best_codes[active[improved]] = codes.detach()[improved]
        self.num_bad_checks[active] = torch.where(improved, 0, self.num_bad_checks[active] + 1)
        self.val_losses.append(_scatter_to_subjects(losses, active, len(self.codes)))

    def is_active(self, active: Tensor, patience: int | None) -> Tensor:
        """Return which of the active subjects continue [k]."""
        if patience is None:
            return torch.ones_like(active, dtype=torch.bool)
        return self.num_bad_checks[active] < patience


def _sample_batch(
    examples: TrainingExamples, active: Tensor, config: FineTuneConfig, rng: SubjectRng | None
) -> tuple[Tensor, NoiseSample | None]:
    """Draw example numbers [b, k] and, unless the loss is to draw it, the noise sample of b * k."""
    batch_size, num_groups = config.batch_size, config.num_paired_groups
    device = examples.latents.device
    if rng is not None:
        return rng.sample_batch(examples, batch_size, active)
    group_size = len(active) // num_groups
    indices = torch.randint(examples.latents.shape[1], (batch_size, group_size), device=device)
    indices = indices.repeat(1, num_groups)  # [b, k]
    if examples.num_examples is not None:
        indices %= torch.tensor(examples.num_examples, device=device)[active]
    if num_groups == 1:
        return indices, None
    # paired groups: one draw per pair, repeated along the subjects
    latent_shape = examples.latents.shape[2:]  # (c, h, w)
    u = torch.rand(batch_size, group_size, device=device).repeat(1, num_groups)  # [b, k]
    noise = torch.randn(batch_size, group_size, *latent_shape, device=device)
    noise = noise.repeat(1, num_groups, *[1] * len(latent_shape))  # [b, k, c, h, w]
    return indices, (u.flatten(), noise.flatten(0, 1))


def _compute_val_losses(
    denoiser: nn.Module, scheduler: "SchedulerMixin", probe: ValidationProbe, active: Tensor
) -> Tensor:
    """Compute the mean loss of each active subject over the draws of the probe [k]."""
    losses = []
    for indices, u, noise in zip(probe.indices, probe.u, probe.noise, strict=True):  # one draw
        latents, conditions = probe.examples.gather_examples(indices[active][None], active)
        noise_sample = (u[active], noise[active])  # [k], [k, c, h, w]
        losses.append(
            compute_denoising_loss(
                denoiser, scheduler, latents, noise_sample=noise_sample, **conditions
            )
        )  # [k]
    return torch.stack(losses).mean(0)


def _select_active(
    codes: Tensor, optimizer: torch.optim.Adam, active_mask: Tensor
) -> tuple[Tensor, torch.optim.Adam]:
    """Select rows of the codes, and the state of Adam as it is without the other rows."""
    active_codes = codes.detach()[active_mask].requires_grad_()
    active_optimizer = torch.optim.Adam([active_codes], optimizer.param_groups[0]["lr"])
    active_optimizer.state[active_codes] = {
        name: value[active_mask] if value.ndim else value
        for name, value in optimizer.state[codes].items()
    }
    return active_codes, active_optimizer


def _select_base_loras(base_loras: LoraWeights, active: Tensor) -> LoraWeights:
    return base_loras if len(active) == len(base_loras) else base_loras[active]


def _scatter_to_subjects(values: Tensor, active: Tensor, num_subjects: int) -> Tensor:
    """Scatter values of the active subjects [k] to all subjects [K]; NaN for the others."""
    row = torch.full((num_subjects,), torch.nan, device=values.device, dtype=values.dtype)
    return row.index_copy(0, active, values)


def _stack_losses(losses: list[Tensor], num_subjects: int) -> Tensor:
    return torch.stack(losses) if losses else torch.zeros(0, num_subjects)
