"""Denoising objectives: what a noised latent is made of, what the network should say, and the loss."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.cpu import select_sdpa_kernel


def add_noise(
    scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """(network input, network target) for a diffusers noise scheduler or a flow-matching one.

    ``prediction_type`` epsilon (DDPM), v_prediction (2202.00512) or sample; flow schedulers: x_t = (1-s)x + s noise,
    target noise - x (2403.03206). ``timesteps`` [batch], as indices into the training schedule.
    """
    if hasattr(scheduler, "add_noise"):
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        match scheduler.config.prediction_type:
            case "epsilon":
                return noisy_latents, noise
            case "v_prediction":
                return noisy_latents, scheduler.get_velocity(latents, noise, timesteps)
            case "sample":
                return noisy_latents, latents
            case prediction_type:
                raise ValueError(f"unknown prediction type {prediction_type!r}")
    sigma = scheduler.sigmas.to(latents)[timesteps].view(-1, 1, 1, 1)
    return (1 - sigma) * latents + sigma * noise, noise - latents


def compute_model_target(
    scheduler: Any, noisy_latents: Tensor, x0: Tensor, timesteps: Tensor
) -> Tensor:
    """What a network that expects the latents ``clean`` behind ``noisy_latents`` says: the target of ``add_noise``, for any ``noisy_latents``."""
    if not hasattr(scheduler, "add_noise"):
        return (noisy_latents - x0) / scheduler.sigmas.to(noisy_latents)[timesteps].view(
            -1, 1, 1, 1
        )
    alpha_prod_t = scheduler.alphas_cumprod.to(noisy_latents)[timesteps].view(-1, 1, 1, 1)
    noise = (noisy_latents - alpha_prod_t.sqrt() * x0) / (1 - alpha_prod_t).sqrt()
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return alpha_prod_t.sqrt() * noise - (1 - alpha_prod_t).sqrt() * x0
        case "sample":
            return x0
        case prediction_type:
            raise ValueError(f"unknown prediction type {prediction_type!r}")


def predict_x0(
    scheduler: Any, noisy_latents: Tensor, model_output: Tensor, timesteps: Tensor
) -> Tensor:
    """The clean latents that a network expects behind ``noisy_latents`` when it says ``model_output``; undoes ``compute_model_target``."""
    if not hasattr(scheduler, "add_noise"):
        return (
            noisy_latents
            - scheduler.sigmas.to(noisy_latents)[timesteps].view(-1, 1, 1, 1) * model_output
        )
    alpha_prod_t = scheduler.alphas_cumprod.to(noisy_latents)[timesteps].view(-1, 1, 1, 1)
    match scheduler.config.prediction_type:
        case "epsilon":
            return (noisy_latents - (1 - alpha_prod_t).sqrt() * model_output) / alpha_prod_t.sqrt()
        case "v_prediction":
            return alpha_prod_t.sqrt() * noisy_latents - (1 - alpha_prod_t).sqrt() * model_output
        case "sample":
            return model_output
        case prediction_type:
            raise ValueError(f"unknown prediction type {prediction_type!r}")


def compute_noise_level(scheduler: Any, timesteps: Tensor) -> Tensor:
    """How much of a noised latent is noise, [batch, 1, 1, 1] from 0 to 1: the σ of flow matching, for any schedule."""
    if not hasattr(scheduler, "add_noise"):
        return scheduler.sigmas.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    alpha_prod_t = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return (1 - alpha_prod_t).sqrt() / (alpha_prod_t.sqrt() + (1 - alpha_prod_t).sqrt())


def compute_denoising_loss(
    denoiser: Any,
    scheduler: Any,
    latents: Tensor,
    *,
    shift: float = 1.0,
    noise_sample: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    x0_offset: Tensor | None = None,
    cond_latents: Tensor | None = None,
    aux_loss_fn: Callable[[Tensor], Tensor] | None = None,
    aux_loss_weight: float | Tensor | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Squared error per sample [batch], at random timesteps, of the denoiser as it is (perhaps ``inject_lora``);
    ``model_kwargs`` are the denoiser's own arguments (``encoder_hidden_states`` and, for SDXL, ``added_cond_kwargs``).

    ``shift`` > 1 draws noisier timesteps more often, where text decides what is drawn (2403.03206, eq. 23). ``noise_sample`` is
    what chance would decide: u [batch] in [0, 1), the place of the timestep, and the noise, shaped like ``clean``.
    ``weight`` broadcasts onto ``clean``: how much each place counts, with a mean of 1 if the loss is to keep its scale.
    ``x0_offset``, shaped like ``clean``, is added to the clean latents that are wanted, in proportion to the noise: an
    edit (2506.07992). ``cond_latents``, of the same height and width, is what the denoiser sees beside the noised latents,
    as further channels (InstructPix2Pix, 2211.09800). ``aux_loss_fn`` maps the clean latents that the denoiser expects to a
    further loss per sample [batch], which counts less the more noise there was (as identity losses do, 2404.16022), or
    ``aux_loss_weight`` times (a number, or one per sample [batch]) where ``cond_latents`` tells what to expect behind any noise.
    """
    num_train_timesteps = scheduler.config.num_train_timesteps
    u, noise = noise_sample or (
        torch.rand(len(latents), device=latents.device),
        torch.randn_like(latents),
    )
    timesteps = (num_train_timesteps * shift * u / (1 + (shift - 1) * u)).long()
    noisy_latents, target = add_noise(scheduler, latents, noise, timesteps)
    if x0_offset is not None:
        target = compute_model_target(
            scheduler,
            noisy_latents,
            latents + compute_noise_level(scheduler, timesteps) * x0_offset,
            timesteps,
        )
    with _select_attention_kernel(denoiser, latents):
        model_input = (
            noisy_latents
            if cond_latents is None
            else torch.cat([noisy_latents, cond_latents.to(noisy_latents)], 1)
        )
        model_output = denoiser(model_input, timesteps, **model_kwargs).sample
    error = F.mse_loss(model_output.float(), target.float(), reduction="none")
    loss = (error if weight is None else error * weight).mean((1, 2, 3))
    if aux_loss_fn is not None:
        sample_weight = (
            1 - compute_noise_level(scheduler, timesteps).flatten()
            if aux_loss_weight is None
            else aux_loss_weight
        )
        loss = loss + sample_weight * aux_loss_fn(
            predict_x0(scheduler, noisy_latents.float(), model_output.float(), timesteps)
        )
    return loss


def compute_edit_region_weights(before: Tensor, after: Tensor, max_extra_weight: float) -> Tensor:
    """How much each place of an edit counts, [n, 1, h, w]: 1 where nothing changes, up to 1 + ``max_extra_weight``."""
    relative_change = (after - before).abs().mean(1, keepdim=True) / after.std()
    return 1 + max_extra_weight * relative_change.clamp(max=1)


def _select_attention_kernel(denoiser: Any, latents: Tensor) -> AbstractContextManager[Any]:
    """Checkpointed blocks must recompute with the kernel they ran with."""
    is_checkpointing = getattr(denoiser, "is_gradient_checkpointing", False)
    return nullcontext() if is_checkpointing else select_sdpa_kernel(latents, latents[0, 0].numel())
