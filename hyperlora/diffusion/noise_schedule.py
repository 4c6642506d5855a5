"""``NoiseSchedule``: how much of the latents is signal and how much noise, for any scheduler.

    x_t = α_t x_0 + σ_t ε

DDPM (2006.11239):            α_t² + σ_t² = 1,  α_t² = alphas_cumprod[t]
flow matching (2403.03206):   α_t + σ_t = 1,    σ_t = t / num_train_timesteps

Times t are those of ``scheduler.timesteps``: larger ones are noisier. DDPM knows whole numbers, an
index each; flow matching any number, so its σ needs no table.

What a denoiser predicts is a linear function of x_0 and ε, its *prediction type*.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_LinearMap = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _PredictionType:
    """What a denoiser predicts, and how its prediction gives x_0 back.

    Attributes:
        compute_target: (α, σ, x_0, ε) to the output of a perfect denoiser.
        compute_x0: (α, σ, x_t, output) to x_0.
    """

    compute_target: _LinearMap
    compute_x0: _LinearMap


_PREDICTION_TYPES: Final[Mapping[str, _PredictionType]] = {
    "epsilon": _PredictionType(  # ε, 2006.11239, eq. 14; x_0 from x_t = α x_0 + σ ε
        lambda alpha, sigma, x0, noise: noise,
        lambda alpha, sigma, x_t, output: (x_t - sigma * output) / alpha,
    ),
    "v_prediction": _PredictionType(  # v = α ε - σ x_0, 2202.00512, appendix D
        lambda alpha, sigma, x0, noise: alpha * noise - sigma * x0,
        # α x_t - σ v = (α² + σ²) x_0, so it needs α² + σ² = 1
        lambda alpha, sigma, x_t, output: alpha * x_t - sigma * output,
    ),
    "sample": _PredictionType(  # x_0 itself
        lambda alpha, sigma, x0, noise: x0,
        lambda alpha, sigma, x_t, output: output,
    ),
    "flow": _PredictionType(  # dx_t/dσ of x_t = (1 - σ) x_0 + σ ε, 2403.03206, eq. 13
        lambda alpha, sigma, x0, noise: noise - x0,
        # x_t - σ (ε - x_0) = (α + σ) x_0, so it needs α + σ = 1
        lambda alpha, sigma, x_t, output: x_t - sigma * output,
    ),
}


class NoiseSchedule:
    """The α_t, σ_t and prediction type of a scheduler at any of its timesteps.

    Args:
        scheduler: Any scheduler of diffusers with ``alphas_cumprod`` (DDPM and its samplers), or
            one of flow matching. Its prediction type must be ``epsilon``, ``v_prediction``
            or ``sample``; flow matching has one of its own.

    Raises:
        ValueError: If the scheduler has another prediction type.
    """

    def __init__(self, scheduler: "SchedulerMixin") -> None:
        self._alphas_cumprod: Tensor | None = getattr(scheduler, "alphas_cumprod", None)  # [T]
        self._is_flow_matching = self._alphas_cumprod is None
        name = "flow" if self._is_flow_matching else scheduler.config.prediction_type
        if name not in _PREDICTION_TYPES:
            known = ", ".join(_PREDICTION_TYPES)
            raise ValueError(f"unknown prediction type {name!r}; known: {known}")
        self._prediction_type = _PREDICTION_TYPES[name]
        self.num_train_timesteps: int = scheduler.config.num_train_timesteps

    def sample_timesteps(self, u: Tensor, shift: float = 1.0) -> Tensor:
        """Map uniform random numbers to timesteps.

        Args:
            u: In [0, 1), [batch].
            shift: Above 1, noisier timesteps are drawn more often (2403.03206, eq. 23).

        Returns:
            Timesteps [batch]: whole numbers for DDPM, floats for flow matching.
        """
        num_timesteps = self.num_train_timesteps
        # t = T s u / (1 + (s - 1) u): u = 1 stays T, and the mean rises with the shift s
        timesteps = num_timesteps * shift * u / (1 + (shift - 1) * u)  # [B], in [0, T]
        if self._is_flow_matching:
            # σ = 0 would make the ε that explains x_t undefined; samplers end at σ = 1/T, too
            return timesteps.clamp(min=1.0)
        return timesteps.long().clamp(max=num_timesteps - 1)  # u near 1 can round up to T

    def compute_alpha_sigma(
        self, timesteps: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute α_t and σ_t.

        Args:
            timesteps: As ``sample_timesteps`` returns them, [batch].
            dtype: Of the result; None for float32.

        Returns:
            α_t and σ_t, each [batch, 1, 1, 1].
        """
        if self._alphas_cumprod is None:
            sigma = (timesteps / self.num_train_timesteps).to(dtype).view(-1, 1, 1, 1)
            return 1 - sigma, sigma  # α + σ = 1
        # α_t², [B, 1, 1, 1]
        values = self._alphas_cumprod.to(timesteps.device, dtype)[timesteps].view(-1, 1, 1, 1)
        return values.sqrt(), (1 - values).sqrt()  # α² + σ² = 1

    def compute_noise_level(self, timesteps: Tensor) -> Tensor:
        """Compute the share of noise, σ_t / (α_t + σ_t): the σ of flow matching, for any schedule.

        Args:
            timesteps: As ``sample_timesteps`` returns them, [batch].

        Returns:
            From 0 (clean) to 1 (noise alone), [batch, 1, 1, 1].
        """
        alpha, sigma = self.compute_alpha_sigma(timesteps)
        return sigma / (alpha + sigma)  # flow matching: σ itself, since α + σ = 1

    def compute_min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Compute min(SNR, γ), the weight of an error of x_0 (Min-SNR, 2303.09556), SNR = α² / σ².

        It is the weight of the prediction's own error: ε errors count min(SNR, γ) / SNR, and v
        errors min(SNR, γ) / (SNR + 1).

        Args:
            timesteps: As ``sample_timesteps`` returns them, [batch].
            gamma: γ, 5 in the paper; the largest weight.

        Returns:
            Weights, [batch, 1, 1, 1].
        """
        alpha, sigma = self.compute_alpha_sigma(timesteps)
        snr = (alpha / sigma).square()
        # x_0 is linear in the output, so an error of 1 there becomes this error of x_0
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        x0_error = self._prediction_type.compute_x0(alpha, sigma, zero, one)
        # ε: (σ / α)² min(SNR, γ), which is bounded by 1; at α = 0 it would be 0 · ∞
        return (snr.clamp(max=gamma) * x0_error.square()).nan_to_num(1.0)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Make a denoiser's input and the target of its output.

        Args:
            x0: Clean latents, [batch, channels, h, w].
            noise: Standard normal, shaped like ``x0``.
            timesteps: As ``sample_timesteps`` returns them, [batch].

        Returns:
            Noisy latents and target, both shaped like ``x0``.
        """
        alpha, sigma = self.compute_alpha_sigma(timesteps, x0.dtype)
        noisy_latents = alpha * x0 + sigma * noise  # [B, C, h, w]
        return noisy_latents, self._prediction_type.compute_target(alpha, sigma, x0, noise)

    def compute_target(self, noisy_latents: Tensor, x0: Tensor, timesteps: Tensor) -> Tensor:
        """Compute the output of a denoiser that sees ``noisy_latents`` and predicts ``x0``.

        Args:
            noisy_latents: [batch, channels, h, w].
            x0: Clean latents to be predicted, which need not be those that were noised.
            timesteps: As ``sample_timesteps`` returns them, [batch].

        Returns:
            The output, shaped like ``x0``.
        """
        alpha, sigma = self.compute_alpha_sigma(timesteps, noisy_latents.dtype)
        # the noise that would explain x_t if x_0 were clean, from x_t = α x_0 + σ ε
        noise = (noisy_latents - alpha * x0) / sigma  # ε, [B, C, h, w]
        return self._prediction_type.compute_target(alpha, sigma, x0, noise)

    def predict_x0(self, noisy_latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Tensor:
        """Compute the clean latents that a denoiser predicts; the inverse of ``compute_target``.

        Args:
            noisy_latents: The denoiser's input, [batch, channels, h, w].
            model_output: The denoiser's output, of the same shape.
            timesteps: As ``sample_timesteps`` returns them, [batch].

        Returns:
            Predicted clean latents, of the same shape.
        """
        alpha, sigma = self.compute_alpha_sigma(timesteps, noisy_latents.dtype)
        return self._prediction_type.compute_x0(alpha, sigma, noisy_latents, model_output)
