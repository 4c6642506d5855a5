"""The denoising loss: what its options add to it."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.losses import (
    AuxLoss,
    compute_denoising_loss,
    compute_edit_region_weights,
)
from hyperlora.diffusion.noise_schedule import NoiseSchedule

CONDITIONS: Conditions = {"prompt_embeds": torch.zeros(4, 1, 1)}
SCHEDULERS = {
    **{kind: DDPMScheduler(prediction_type=kind) for kind in ("epsilon", "v_prediction", "sample")},
    "flow": FlowMatchEulerDiscreteScheduler(),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_schedule_undoes_its_own_target(name: str) -> None:
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    timesteps = torch.tensor([10, 400, 900, 500])
    schedule = NoiseSchedule(SCHEDULERS[name])
    noisy_latents, target = schedule.add_noise(x0, noise, timesteps)
    assert not torch.allclose(noisy_latents, x0, atol=0.1)
    torch.testing.assert_close(schedule.compute_target(noisy_latents, x0, timesteps), target)
    torch.testing.assert_close(schedule.predict_x0(noisy_latents, target, timesteps), x0)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample"])
def test_noise_schedule_equals_diffusers(name: str) -> None:
    x0, noise = torch.randn(2, 4, 3, 4, 4)
    timesteps = torch.tensor([10, 400, 900, 500])
    scheduler = SCHEDULERS[name]
    noisy_latents, target = NoiseSchedule(scheduler).add_noise(x0, noise, timesteps)
    assert torch.equal(noisy_latents, scheduler.add_noise(x0, noise, timesteps))
    if name == "v_prediction":
        assert torch.equal(target, scheduler.get_velocity(x0, noise, timesteps))


def test_noise_schedule_rejects_unknown_prediction_types() -> None:
    message = "unknown prediction type 'score'; known: epsilon, v_prediction, sample, flow$"
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(DDPMScheduler(prediction_type="score"))


@pytest.mark.parametrize("name", ["epsilon", "flow"])
def test_timesteps_follow_their_formula_up_to_the_ends(name: str) -> None:
    """T s u / (1 + (s - 1) u): a flow starts at 1, DDPM rounds down and ends at T - 1."""
    schedule = NoiseSchedule(SCHEDULERS[name])
    assert schedule.num_train_timesteps == 1000
    u = torch.tensor([0.0, 0.0015, 0.25, 0.4999, 1.0])
    plain = [1.0, 1.5, 250.0, 499.9, 1000.0] if name == "flow" else [0, 1, 250, 499, 999]
    shifted = [1.0, 4.486540, 500.0, 749.924977, 1000.0]
    shifted = shifted if name == "flow" else [0, 4, 500, 749, 999]
    for timesteps, expected in (
        (schedule.sample_timesteps(u), plain),
        (schedule.sample_timesteps(u, 1.0), plain),
        (schedule.sample_timesteps(u, 3.0), shifted),
    ):
        assert timesteps.tolist() == pytest.approx(expected, rel=1e-5)
        assert timesteps.is_floating_point() == (name == "flow")


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_alpha_and_sigma_of_hand_made_schedules(dtype: torch.dtype | None) -> None:
    scheduler = SimpleNamespace(
        alphas_cumprod=torch.tensor([0.81, 0.36, 0.0]),
        config=SimpleNamespace(prediction_type="epsilon", num_train_timesteps=3),
    )
    ddpm = NoiseSchedule(scheduler)  # type: ignore[arg-type]
    flow = NoiseSchedule(SCHEDULERS["flow"])
    for schedule, timesteps, alphas, sigmas in (
        (ddpm, torch.tensor([2, 0, 1]), [0.0, 0.9, 0.6], [1.0, 0.19**0.5, 0.8]),
        (flow, torch.tensor([1000.0, 250.0]), [0.0, 0.75], [1.0, 0.25]),
    ):
        alpha, sigma = schedule.compute_alpha_sigma(timesteps, dtype)
        assert alpha.dtype == sigma.dtype == (dtype or torch.float32)
        assert alpha.shape == sigma.shape == (len(alphas), 1, 1, 1)
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
        assert alpha.flatten().tolist() == pytest.approx(alphas, abs=tolerance)
        assert sigma.flatten().tolist() == pytest.approx(sigmas, abs=tolerance)
        levels = [s / (a + s) for a, s in zip(alphas, sigmas, strict=True)]
        noise_level = schedule.compute_noise_level(timesteps)
        assert noise_level.flatten().tolist() == pytest.approx(levels, abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_x0_offset_moves_the_target_in_proportion_to_the_noise(name: str) -> None:
    x0, noise, offset = torch.randn(3, 4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    scheduler, noise_levels = SCHEDULERS[name], []
    schedule = NoiseSchedule(scheduler)

    def predict_offset_x0(
        noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        noise_level = schedule.compute_noise_level(timesteps)
        noise_levels.append(noise_level.flatten())
        offset_x0 = x0 + noise_level * offset
        return schedule.compute_target(noisy_latents, offset_x0, timesteps)

    noise_sample = torch.tensor([0.05, 0.4, 0.6, 0.95]), noise
    loss = compute_denoising_loss(
        predict_offset_x0, scheduler, x0, CONDITIONS, noise_sample=noise_sample, x0_offset=offset
    )
    assert float(loss.max()) < 1e-8
    loss = compute_denoising_loss(
        predict_offset_x0, scheduler, x0, CONDITIONS, noise_sample=noise_sample
    )
    assert float(loss.min()) > 1e-5
    assert float(noise_levels[0].min()) >= 0 and float(noise_levels[0].max()) <= 1


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_errors_as_in_the_training_scripts_of_diffusers(
    name: str, gamma: float
) -> None:
    """Of ε and v predictions as written there; of the others by errors of x_0."""
    x0, noise, error = torch.randn(3, 4, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    scheduler, timesteps = SCHEDULERS[name], torch.tensor([10, 300, 600, 990])
    schedule = NoiseSchedule(scheduler)

    def predict_with_error(
        noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        return schedule.compute_target(noisy_latents, x0, timesteps) + error

    u = (timesteps + 0.5 * (name != "flow")) / 1000
    weighted, unweighted = (
        compute_denoising_loss(
            predict_with_error,
            scheduler,
            x0,
            CONDITIONS,
            noise_sample=(u, noise),
            snr_gamma=snr_gamma,
        )
        for snr_gamma in (gamma, None)
    )
    if name in ("epsilon", "v_prediction"):
        snr = compute_snr(scheduler, timesteps)
        base_weight = torch.stack([snr, gamma * torch.ones_like(timesteps)], 1).min(1)[0]
        expected = base_weight / (snr if name == "epsilon" else snr + 1)
    else:
        sigma = (
            timesteps / 1000 if name == "flow" else (1 - scheduler.alphas_cumprod[timesteps]) ** 0.5
        )
        alpha = 1 - sigma if name == "flow" else scheduler.alphas_cumprod[timesteps] ** 0.5
        expected = (alpha / sigma).square().clamp(max=gamma) * (sigma**2 if name == "flow" else 1)
    torch.testing.assert_close(weighted / unweighted, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_finite_where_there_is_no_signal(prediction_type: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    weight = NoiseSchedule(scheduler).compute_min_snr_weight(torch.tensor([999]), 5.0)
    assert float(weight) == pytest.approx(1.0 if prediction_type == "epsilon" else 0.0, abs=1e-3)


def test_weight_scales_the_error_of_each_latent_pixel() -> None:
    x0, noise = torch.randn(2, 2, 3, 4, 4)
    noise_sample = torch.tensor([0.3, 0.6]), noise

    def predict_zero(noisy_latents: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.zeros_like(noisy_latents)

    scheduler = SCHEDULERS["epsilon"]
    corner = torch.zeros(4, 4)
    corner[0, 0] = 16.0
    weighted = compute_denoising_loss(
        predict_zero, scheduler, x0, CONDITIONS, noise_sample=noise_sample, weight=corner
    )
    torch.testing.assert_close(weighted, noise[:, :, 0, 0].square().mean(1))
    unweighted = compute_denoising_loss(
        predict_zero, scheduler, x0, CONDITIONS, noise_sample=noise_sample
    )
    uniform = compute_denoising_loss(
        predict_zero, scheduler, x0, CONDITIONS, noise_sample=noise_sample, weight=torch.ones(4, 4)
    )
    torch.testing.assert_close(uniform, unweighted)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_aux_loss_is_added_with_its_weight(name: str) -> None:
    x0, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    scheduler, noise_sample = SCHEDULERS[name], (torch.tensor([0.3, 0.6]), noise)
    schedule = NoiseSchedule(scheduler)

    def predict_brighter_x0(
        noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        return schedule.compute_target(noisy_latents, x0 + 0.5, timesteps)

    def compute_mean_error(pred_x0: torch.Tensor) -> torch.Tensor:
        return (pred_x0 - x0).mean((1, 2, 3))

    def compute_loss(aux_loss: AuxLoss | None) -> torch.Tensor:
        return compute_denoising_loss(
            predict_brighter_x0,
            scheduler,
            x0,
            CONDITIONS,
            noise_sample=noise_sample,
            aux_loss=aux_loss,
        )

    denoising_loss = compute_loss(None)
    noise_level = schedule.compute_noise_level(torch.tensor([300, 600])).flatten()
    for weight, expected in (
        (None, 0.5 * (1 - noise_level)),
        (0.2, torch.full((2,), 0.1)),
        (torch.tensor([0.2, 0.0]), torch.tensor([0.1, 0.0])),
    ):
        difference = compute_loss(AuxLoss(compute_mean_error, weight)) - denoising_loss
        torch.testing.assert_close(difference, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_loss_draws_a_time_and_noise_for_each_sample(name: str) -> None:
    """After the same seed: u of each sample, then the noise; conditions reach the denoiser."""
    x0, seen = torch.randn(3, 4, 2, 5), []

    def predict(
        noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        seen.append((noisy_latents, timesteps, conditions))
        return torch.zeros_like(noisy_latents)

    torch.manual_seed(3)
    drawn = compute_denoising_loss(predict, SCHEDULERS[name], x0, CONDITIONS)
    torch.manual_seed(3)
    noise_sample = torch.rand(3), torch.randn(3, 4, 2, 5)
    given = compute_denoising_loss(
        predict, SCHEDULERS[name], x0, CONDITIONS, noise_sample=noise_sample, shift=1.0
    )
    assert torch.equal(drawn, given) and drawn.shape == (3,)
    assert torch.equal(seen[0][0], seen[1][0])
    torch.testing.assert_close(seen[0][1].float(), noise_sample[0] * 1000, atol=1.0, rtol=0)
    assert seen[0][2] is seen[1][2] is CONDITIONS


def test_loss_of_half_precision_is_computed_in_float32() -> None:
    """Squared errors of 1e-4 would be 0 in float16."""
    x0, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).half()

    def predict(noisy_latents: torch.Tensor, *_: object) -> torch.Tensor:
        return noise + 1e-4

    loss = compute_denoising_loss(
        predict,
        SCHEDULERS["epsilon"],
        x0,
        CONDITIONS,
        noise_sample=(torch.tensor([0.3, 0.6]), noise),
    )
    assert loss.dtype == torch.float32
    assert 1e-9 < float(loss.max()) < 1e-7


def test_edit_region_weights_grow_with_the_change_up_to_their_maximum() -> None:
    """Two channels that change by a and b: 1 + w min(1, (|a| + |b|) / 2 / std)."""
    torch.manual_seed(0)
    after = torch.randn(3, 2, 4, 5)
    std = after.std()
    change = torch.zeros_like(after)
    change[0, 0, 1, 2], change[0, 1, 1, 2] = std, -0.5 * std  # 0.75 on average
    change[2, :, 3, 4] = 7 * std  # more than one standard deviation
    expected = torch.ones(3, 1, 4, 5)
    expected[0, 0, 1, 2] += 3 * 0.75
    expected[2, 0, 3, 4] += 3
    torch.testing.assert_close(compute_edit_region_weights(after - change, after, 3.0), expected)
