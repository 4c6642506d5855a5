"""Denoising objectives: what a noised latent is made of, what the network should say, and the loss."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.cpu import quick_attention


def noised(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """(network input, network target) for a diffusers noise scheduler or a flow-matching one.

    ``prediction_type`` epsilon (DDPM), v_prediction (2202.00512) or sample; flow schedulers: x_t = (1-s)x + s noise,
    target noise - x (2403.03206). ``timesteps`` [batch], as indices into the training schedule.
    """
    if hasattr(scheduler, "add_noise"):
        x = scheduler.add_noise(clean, noise, timesteps)
        match scheduler.config.prediction_type:
            case "epsilon":
                return x, noise
            case "v_prediction":
                return x, scheduler.get_velocity(clean, noise, timesteps)
            case "sample":
                return x, clean
            case other:
                raise ValueError(f"unknown prediction type {other!r}")
    sigma = scheduler.sigmas.to(clean)[timesteps].view(-1, 1, 1, 1)
    return (1 - sigma) * clean + sigma * noise, noise - clean


def said_for(scheduler: Any, x: Tensor, clean: Tensor, timesteps: Tensor) -> Tensor:
    """What a network that expects the latents ``clean`` behind ``x`` says: the target of ``noised``, for any ``x``."""
    if not hasattr(scheduler, "add_noise"):
        return (x - clean) / scheduler.sigmas.to(x)[timesteps].view(-1, 1, 1, 1)
    signal = scheduler.alphas_cumprod.to(x)[timesteps].view(-1, 1, 1, 1)
    noise = (x - signal.sqrt() * clean) / (1 - signal).sqrt()
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return signal.sqrt() * noise - (1 - signal).sqrt() * clean
        case "sample":
            return clean
        case other:
            raise ValueError(f"unknown prediction type {other!r}")


def clean_for(scheduler: Any, x: Tensor, said: Tensor, timesteps: Tensor) -> Tensor:
    """The clean latents that a network expects behind ``x`` when it says ``said``; undoes ``said_for``."""
    if not hasattr(scheduler, "add_noise"):
        return x - scheduler.sigmas.to(x)[timesteps].view(-1, 1, 1, 1) * said
    signal = scheduler.alphas_cumprod.to(x)[timesteps].view(-1, 1, 1, 1)
    match scheduler.config.prediction_type:
        case "epsilon":
            return (x - (1 - signal).sqrt() * said) / signal.sqrt()
        case "v_prediction":
            return signal.sqrt() * x - (1 - signal).sqrt() * said
        case "sample":
            return said
        case other:
            raise ValueError(f"unknown prediction type {other!r}")


def noise_share(scheduler: Any, timesteps: Tensor) -> Tensor:
    """How much of a noised latent is noise, [batch, 1, 1, 1] from 0 to 1: the σ of flow matching, for any schedule."""
    if not hasattr(scheduler, "add_noise"):
        return scheduler.sigmas.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    signal = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return (1 - signal).sqrt() / (signal.sqrt() + (1 - signal).sqrt())


def denoising_loss(
    denoiser: Any,
    scheduler: Any,
    clean: Tensor,
    *,
    shift: float = 1.0,
    draw: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    change: Tensor | None = None,
    beside: Tensor | None = None,
    also: Callable[[Tensor], Tensor] | None = None,
    sure: float | Tensor | None = None,
    **conditions: Any,
) -> Tensor:
    """Squared error per sample [batch], at random timesteps, of the denoiser as it is (perhaps ``injected``);
    ``conditions`` are the denoiser's own arguments (``encoder_hidden_states`` and, for SDXL, ``added_cond_kwargs``).

    ``shift`` > 1 draws noisier timesteps more often, where text decides what is drawn (2403.03206, eq. 23). ``draw`` is
    what chance would decide: u [batch] in [0, 1), the place of the timestep, and the noise, shaped like ``clean``.
    ``weight`` broadcasts onto ``clean``: how much each place counts, with a mean of 1 if the loss is to keep its scale.
    ``change``, shaped like ``clean``, is added to the clean latents that are wanted, in proportion to the noise: an
    edit (2506.07992). ``beside``, of the same height and width, is what the denoiser sees beside the noised latents,
    as further channels (InstructPix2Pix, 2211.09800). ``also`` maps the clean latents that the denoiser expects to a
    further loss per sample [batch], which counts less the more noise there was (as identity losses do, 2404.16022), or
    ``sure`` times (a number, or one per sample [batch]) where ``beside`` tells what to expect behind any noise.
    """
    steps = scheduler.config.num_train_timesteps
    u, noise = draw or (torch.rand(len(clean), device=clean.device), torch.randn_like(clean))
    timesteps = (steps * shift * u / (1 + (shift - 1) * u)).long()
    x, target = noised(scheduler, clean, noise, timesteps)
    if change is not None:
        target = said_for(scheduler, x, clean + noise_share(scheduler, timesteps) * change, timesteps)
    with _attention_for(denoiser, clean):
        seen = x if beside is None else torch.cat([x, beside.to(x)], 1)
        said = denoiser(seen, timesteps, **conditions).sample
    error = F.mse_loss(said.float(), target.float(), reduction="none")
    loss = (error if weight is None else error * weight).mean((1, 2, 3))
    if also is not None:
        counts = 1 - noise_share(scheduler, timesteps).flatten() if sure is None else sure
        loss = loss + counts * also(clean_for(scheduler, x.float(), said.float(), timesteps))
    return loss


def edit_weight(before: Tensor, after: Tensor, most: float) -> Tensor:
    """How much each place of an edit counts, [n, 1, h, w]: 1 where nothing changes, up to 1 + ``most``."""
    changed = (after - before).abs().mean(1, keepdim=True) / after.std()
    return 1 + most * changed.clamp(max=1)


def _attention_for(denoiser: Any, latents: Tensor) -> AbstractContextManager[Any]:
    """Checkpointed blocks must recompute with the kernel they ran with."""
    checkpointed = getattr(denoiser, "is_gradient_checkpointing", False)
    return nullcontext() if checkpointed else quick_attention(latents, latents[0, 0].numel())
