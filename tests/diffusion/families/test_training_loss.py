"""The denoising loss tells each denoiser the noise level as its pipeline does."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.diffusion.noise_schedule import NoiseSchedule
from tests.diffusion.families.calls import make_conditions
from tests.tiny_pipelines import FACTORIES, get_tiny_pipeline

NAMES = [name for name in FACTORIES if get_tiny_pipeline(name).arguments.get("image") is None]
FLOWS = [name for name in NAMES if not name.startswith("stable_diffusion") or name.endswith("_3")]


@pytest.mark.parametrize("name", FLOWS)
def test_noise_is_told_as_at_the_first_step_of_the_pipeline(name: str) -> None:
    tiny = get_tiny_pipeline(name)
    base = DiffusionBase("tiny", tiny.pipe)
    record = tiny.record_calls(tiny.prompts)[0]
    latents = tiny.unpack(record.sample)
    noise = torch.randn_like(latents)
    calls: list[tuple[Tensor, Tensor]] = []

    def record_predict(noisy_latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        calls.append((noisy_latents, timesteps))
        return base.predict(noisy_latents, timesteps, conditions)

    u = torch.full((len(latents),), 0.999)
    with torch.no_grad():
        compute_denoising_loss(
            record_predict,
            base.noise_scheduler,
            torch.zeros_like(latents),
            make_conditions(tiny),
            noise_sample=(u, noise),
        )
    ((noisy_latents, timesteps),) = calls
    torch.testing.assert_close(noisy_latents, 0.999 * noise)
    inputs = base.family.make_inputs(noisy_latents, timesteps, make_conditions(tiny))
    told = inputs[base.family.timestep_input].float()
    expected = torch.as_tensor(record.inputs[base.family.timestep_input]).float().expand_as(told)
    full_range = 1000.0 if float(told.abs().max()) > 2 else 1.0
    torch.testing.assert_close(told, expected, atol=2e-3 * full_range, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_loss_equals_the_error_of_the_pipelines_prediction(name: str) -> None:
    """The prediction that the pipeline hands to its scheduler at a step, against the target."""
    tiny = get_tiny_pipeline(name)
    base = DiffusionBase("tiny", tiny.pipe)
    record = tiny.record_calls(tiny.prompts)[1]
    noisy_latents, timestep = tiny.unpack(record.sample), record.timestep
    schedule = NoiseSchedule(base.noise_scheduler)
    timesteps = timestep.expand(len(noisy_latents))
    alpha, sigma = schedule.compute_alpha_sigma(timesteps)
    noise = torch.randn(noisy_latents.shape, generator=torch.Generator().manual_seed(0))
    clean_latents = (noisy_latents - sigma * noise) / alpha  # which this noise makes noisy_latents
    # a hair above, since DDPM rounds down
    u = (timesteps + (0.5 if not timesteps.is_floating_point() else 0.0)) / 1000
    with torch.no_grad():
        loss = compute_denoising_loss(
            base.predict,
            base.noise_scheduler,
            clean_latents,
            make_conditions(tiny),
            noise_sample=(u, noise),
        )
    target = noise if name in ("stable_diffusion", "stable_diffusion_xl") else noise - clean_latents
    expected = (tiny.unpack(record.prediction) - target).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_shift_raises_the_mean_noise_of_flows() -> None:
    schedule = NoiseSchedule(get_tiny_pipeline("flux").pipe.scheduler)
    u = torch.linspace(0, 0.9999, 10_001)
    for shift, mean in ((1.0, 0.5), (3.0, 0.6760), (0.5, 0.3863)):
        timesteps = schedule.sample_timesteps(u, shift)
        noise_level = schedule.compute_noise_level(timesteps).mean()
        assert abs(float(noise_level) - mean) < 2e-3  # ∫ s u / (1 + (s - 1) u) du
