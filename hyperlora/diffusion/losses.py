"""The denoising loss of a base diffusion model; ``NoiseSchedule`` holds its equations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.noise_schedule import NoiseSchedule

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


Predictor = Callable[[Tensor, Tensor, Conditions], Tensor]
"""(noisy latents [n, c, h, w], timesteps [n], conditions) to the prediction [n, c, h, w], as
``PipelineFamily.predict``."""


@dataclass(frozen=True)
class AuxLoss:
    """A further loss, on the clean latents that the denoiser predicts.

    Attributes:
        fn: Predicted clean latents [batch, channels, h, w] to a loss per sample [batch].
        weight: Factor of the loss, one number or one per sample [batch]. None weights each sample
            by 1 - its noise level, since the prediction is vague where there is much noise
            (as identity losses do, 2404.16022).
    """

    fn: Callable[[Tensor], Tensor]
    weight: float | Tensor | None = None


def compute_denoising_loss(
    predict: Predictor,
    scheduler: "SchedulerMixin",
    latents: Tensor,
    conditions: Conditions,
    *,
    shift: float = 1.0,
    snr_gamma: float | None = None,
    noise_sample: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    x0_offset: Tensor | None = None,
    aux_loss: AuxLoss | None = None,
) -> Tensor:
    """Compute the squared error of a denoiser's output at random timesteps.

    Letters of shapes: B batch, C channels of the latents, h and w their height and width, T
    training timesteps.

    Args:
        predict: Runs the denoiser, e.g. ``base.predict``, possibly inside ``inject_lora``.
        scheduler: DDPM-like or flow-matching scheduler of diffusers.
        latents: Clean latents x_0, [batch, channels, h, w].
        conditions: Of the prompts, with ``image_latents`` where the base edits images.
        shift: Above 1, noisier timesteps are drawn more often (2403.03206, eq. 23): the prompt
            has the most influence there.
        snr_gamma: γ of Min-SNR weighting (2303.09556): errors of x_0 count min(SNR, γ). None
            weights the errors of the denoiser's output alike.
        noise_sample: The random numbers: u [batch] in [0, 1), which gives the timestep, and the
            noise, shaped like ``latents``. None draws both.
        weight: Loss weight of each latent pixel, broadcast onto ``latents``. With a mean of 1 the
            loss keeps its scale.
        x0_offset: Shaped like ``latents``. It is added to the x_0 of the target in proportion to
            the noise level: an edit (2506.07992).
        aux_loss: A further loss on the predicted x_0, added to the squared error.

    Returns:
        Loss per sample, [batch].

    Raises:
        ValueError: If the scheduler's prediction type is unknown.
    """
    schedule = NoiseSchedule(scheduler)
    u, noise = noise_sample or (
        torch.rand(len(latents), device=latents.device),  # [B]
        torch.randn_like(latents),  # ε [B, C, h, w]
    )
    timesteps = schedule.sample_timesteps(u, shift)  # [B]
    # x_t = α_t x_0 + σ_t ε, and what the denoiser should predict, each [B, C, h, w]
    noisy_latents, target = schedule.add_noise(latents, noise, timesteps)
    if x0_offset is not None:
        # The input stays the noisy original, and the target leads to x_0 + σ / (α + σ) offset.
        # Where there is little noise, x_t shows the original, and so little of an edit fits.
        edited_x0 = latents + schedule.compute_noise_level(timesteps) * x0_offset
        target = schedule.compute_target(noisy_latents, edited_x0, timesteps)

    model_output = predict(noisy_latents, timesteps, conditions)  # [B, C, h, w]

    # in float32, since half precision is too coarse for a mean of squares
    squared_error = F.mse_loss(model_output.float(), target.float(), reduction="none")
    if weight is not None:
        squared_error = squared_error * weight  # [B, C, h, w]
    if snr_gamma is not None:
        squared_error = squared_error * schedule.compute_min_snr_weight(timesteps, snr_gamma)
    loss = squared_error.mean((1, 2, 3))  # [B]
    if aux_loss is None:
        return loss

    # [B, C, h, w], from the same output: the further loss needs no other pass of the denoiser
    pred_x0 = schedule.predict_x0(noisy_latents.float(), model_output.float(), timesteps)
    aux_weight = aux_loss.weight
    if aux_weight is None:
        aux_weight = 1 - schedule.compute_noise_level(timesteps).flatten()  # α / (α + σ)  [B]
    return loss + aux_weight * aux_loss.fn(pred_x0)  # [B]


def compute_edit_region_weights(before: Tensor, after: Tensor, max_extra_weight: float) -> Tensor:
    """Compute loss weights that are larger where an edit changes the latents.

    Args:
        before: Latents before the edit, [batch, channels, h, w].
        after: Latents after the edit, of the same shape.
        max_extra_weight: Added to the weight where the mean absolute change is at least one
            standard deviation of ``after``; proportionally less below.

    Returns:
        Weights from 1 to 1 + ``max_extra_weight``, [batch, 1, h, w].
    """
    # mean over the channels, in standard deviations of all latents of the batch
    relative_change = (after - before).abs().mean(1, keepdim=True) / after.std()  # [B, 1, h, w]
    return 1 + max_extra_weight * relative_change.clamp(max=1)
