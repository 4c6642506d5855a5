"""Fine-tune the LoRAs of K subjects at a time on one frozen base, each independently."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.examples import (
    NoiseSample,
    SubjectRng,
    TrainingExamples,
    ValidationProbe,
    gather_rows,
)
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights


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
    base: DiffusionBase,
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

    All tensors are moved to the device of the base, where the results are too.

    Args:
        base: The frozen base.
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

    Raises:
        InvalidArgumentError: The base is offloaded so that no gradient flows through it; or paired
            groups are to stop early, which would part their pairs.
    """
    if config.num_paired_groups > 1 and probe is not None and probe.patience is not None:
        raise InvalidArgumentError(
            "num_paired_groups and the patience of the probe exclude each other, since a subject "
            "that stops early has no pair: give one of them"
        )
    base.check_gradients(("none", "model"))  # only the denoiser runs here, and so it stays
    device, num_subjects = base.device, len(init_codes)
    examples, init_codes = examples.to(device), init_codes.to(device)
    prior_examples = prior_examples and prior_examples.to(device)
    base_loras = base_loras and base_loras.to(device)
    x0_offsets = None if x0_offsets is None else x0_offsets.to(device)
    probe = probe and probe.to(device)
    active = torch.arange(num_subjects, device=device)  # [k], subjects still optimized
    codes = init_codes.detach().clone().requires_grad_()  # [k, P]
    optimizer = torch.optim.Adam([codes], config.lr)
    rng = None if config.seeds is None else SubjectRng(config.seeds)
    compute_loss = partial(_compute_batch_loss, base, config, rng)
    early_stopping = _EarlyStopping(init_codes.detach(), probe is not None)
    losses: list[Tensor] = []  # [K] each
    snapshots: dict[int, LoraWeights] = {}

    def build_loras() -> LoraWeights:
        """Decode the current codes and add the frozen LoRAs."""
        loras = decode_codes(codes)
        return loras if base_loras is None else _select_base_loras(base_loras, active) + loras

    def validate_step(probe: ValidationProbe) -> None:
        """Compute the validation losses of the active subjects and record them."""
        loras = build_loras()
        with torch.no_grad(), base.inject_lora(loras):
            val_losses = _compute_val_losses(base, loras.layout, probe, active)  # [k]
        early_stopping.update_best(active, codes, val_losses)

    if probe is not None:
        validate_step(probe)
    for step in config.iterate_steps():
        loras = build_loras()
        with base.inject_lora(loras):
            loss = compute_loss(loras.layout, examples, active, x0_offsets)  # [k]
            if prior_examples is not None:
                prior_loss = compute_loss(loras.layout, prior_examples, active)  # [k]
                loss = loss + config.prior_loss_weight * prior_loss
        # the sum over subjects gives each row of the codes the gradient of its own loss
        (codes.grad,) = torch.autograd.grad(loss.sum(), codes)
        optimizer.param_groups[0]["lr"] = config.compute_lr(step)
        optimizer.step()
        losses.append(_scatter_to_subjects(loss.detach(), active, num_subjects))
        early_stopping.num_steps[active] = step
        if step in config.snapshot_steps:
            snapshots[step] = decode_codes(early_stopping.update_codes(active, codes).clone())
        if probe is not None and (step % probe.eval_every == 0 or step == config.num_steps):
            validate_step(probe)
            active_mask = early_stopping.is_active(active, probe.patience)  # [k]
            if not active_mask.all():
                early_stopping.update_codes(active, codes)
                active = active[active_mask]
                codes, optimizer = _select_active(codes, optimizer, active_mask)
            if not len(active):
                break
    final_codes = early_stopping.get_final_codes(active, codes)  # [K, P]
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

    def get_final_codes(self, active: Tensor, codes: Tensor) -> Tensor:
        """Return the best codes of all subjects [K, P], or the last ones if none are tracked."""
        return self.update_codes(active, codes) if self.best_codes is None else self.best_codes

    def update_best(self, active: Tensor, codes: Tensor, losses: Tensor) -> None:
        """Record one validation: losses [k] and codes [k, P] of the active subjects [k]."""
        best_losses = self.best_losses[active]  # [k]
        improved = losses < best_losses  # [k]
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


def _compute_batch_loss(
    base: DiffusionBase,
    config: FineTuneConfig,
    rng: SubjectRng | None,
    layout: LoraLayout,
    examples: TrainingExamples,
    active: Tensor,
    x0_offsets: Tensor | None = None,
) -> Tensor:
    """Compute the mean loss of each active subject [k] over a random batch."""
    indices, noise_sample = _sample_batch(examples, active, config, rng)
    latents, conditions = _gather_batch(base, layout, examples, indices, active)
    loss = compute_denoising_loss(
        base.predict,
        base.noise_scheduler,
        latents,
        conditions,
        shift=config.shift,
        snr_gamma=config.snr_gamma,
        noise_sample=noise_sample,
        x0_offset=None if x0_offsets is None else gather_rows(x0_offsets, indices, active),
    )  # [b * k]
    return loss.view(config.batch_size, len(active)).mean(0)


def _sample_batch(
    examples: TrainingExamples, active: Tensor, config: FineTuneConfig, rng: SubjectRng | None
) -> tuple[Tensor, NoiseSample | None]:
    """Draw example numbers [b, k] and, unless the loss is to draw it, the noise sample of b * k."""
    batch_size, num_groups = config.batch_size, config.num_paired_groups
    device = examples.latents.device
    if rng is not None:
        return rng.sample_batch(examples, batch_size, active)
    group_size = len(active) // num_groups
    if examples.num_examples is None:
        indices = torch.randint(examples.latents.shape[1], (batch_size, group_size), device=device)
        indices = indices.repeat(1, num_groups)  # [b, k]
    else:  # alike for each example of a subject
        fractions = torch.rand(batch_size, group_size, device=device).repeat(1, num_groups)
        counts = torch.tensor(examples.num_examples, device=device)[active]  # [k]
        indices = (fractions * counts).long()  # [b, k]
    if num_groups == 1:
        return indices, None
    # paired groups: one draw per pair, repeated along the subjects
    latent_shape = examples.latents.shape[2:]  # (c, h, w)
    u = torch.rand(batch_size, group_size, device=device).repeat(1, num_groups)  # [b, k]
    noise = torch.randn(batch_size, group_size, *latent_shape, device=device)
    noise = noise.repeat(1, num_groups, *[1] * len(latent_shape))  # [b, k, c, h, w]
    return indices, (u.flatten(), noise.flatten(0, 1))


def _gather_batch(
    base: DiffusionBase,
    layout: LoraLayout,
    examples: TrainingExamples,
    indices: Tensor,
    active: Tensor,
) -> tuple[Tensor, Conditions]:
    """Gather latents and conditions of examples [b, k]; LoRAs of text encoders encode anew."""
    latents, conditions = examples.gather_examples(indices, active)  # [b * k, c, h, w]
    if layout.components != (base.family.denoiser_name,):
        prompts = examples.gather_prompts(indices, active)
        conditions = {**conditions, **base.encode_prompts(prompts, requires_grad=True)}
    return latents, conditions


def _compute_val_losses(
    base: DiffusionBase, layout: LoraLayout, probe: ValidationProbe, active: Tensor
) -> Tensor:
    """Compute the mean loss of each active subject over the draws of the probe [k]."""
    losses = []
    for indices, u, noise in zip(probe.indices, probe.u, probe.noise, strict=True):  # one draw
        latents, conditions = _gather_batch(
            base, layout, probe.examples, indices[active][None], active
        )
        noise_sample = (u[active], noise[active])  # [k], [k, c, h, w]
        losses.append(
            compute_denoising_loss(
                base.predict,
                base.noise_scheduler,
                latents,
                conditions,
                noise_sample=noise_sample,
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
