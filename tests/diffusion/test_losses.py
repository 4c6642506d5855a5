"""What is noised can be undone, and the weight of a place counts as it says."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from hyperlora.diffusion.losses import (
    add_noise,
    compute_denoising_loss,
    compute_model_target,
    compute_noise_level,
    predict_x0,
)

SCHEDULES = {
    **{kind: DDPMScheduler(prediction_type=kind) for kind in ("epsilon", "v_prediction", "sample")},
    "flow": FlowMatchEulerDiscreteScheduler(),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_target_says_what_was_noised(name: str) -> None:
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    timesteps = torch.tensor([10, 400, 900, 500])
    x, target = add_noise(SCHEDULES[name], clean, noise, timesteps)
    assert not torch.allclose(x, clean, atol=0.1)
    torch.testing.assert_close(compute_model_target(SCHEDULES[name], x, clean, timesteps), target)
    torch.testing.assert_close(predict_x0(SCHEDULES[name], x, target, timesteps), clean)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_change_is_wanted_in_proportion_to_the_noise(name: str) -> None:
    clean, noise, change = torch.randn(3, 4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    schedule, heard = SCHEDULES[name], []

    def perfect(x: torch.Tensor, timesteps: torch.Tensor, **_: Any) -> Any:
        wanted = clean + compute_noise_level(schedule, timesteps) * change
        heard.append(compute_noise_level(schedule, timesteps).flatten())
        return SimpleNamespace(sample=compute_model_target(schedule, x, wanted, timesteps))

    draw = torch.tensor([0.05, 0.4, 0.6, 0.95]), noise
    right = compute_denoising_loss(perfect, schedule, clean, noise_sample=draw, x0_offset=change)
    assert float(right.max()) < 1e-8
    assert float(compute_denoising_loss(perfect, schedule, clean, noise_sample=draw).min()) > 1e-5
    assert float(heard[0].min()) >= 0 and float(heard[0].max()) <= 1


def test_a_weight_counts_places() -> None:
    clean, noise = torch.randn(2, 2, 3, 4, 4)
    draw = torch.tensor([0.3, 0.6]), noise

    def silent(x: torch.Tensor, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(sample=torch.zeros_like(x))

    schedule = SCHEDULES["epsilon"]
    corner = torch.zeros(4, 4)
    corner[0, 0] = 16.0
    weighted = compute_denoising_loss(silent, schedule, clean, noise_sample=draw, weight=corner)
    torch.testing.assert_close(weighted, noise[:, :, 0, 0].square().mean(1))
    plain = compute_denoising_loss(silent, schedule, clean, noise_sample=draw)
    torch.testing.assert_close(
        compute_denoising_loss(silent, schedule, clean, noise_sample=draw, weight=torch.ones(4, 4)),
        plain,
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_expected_may_be_judged_too(name: str) -> None:
    clean, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    schedule, draw = SCHEDULES[name], (torch.tensor([0.3, 0.6]), noise)

    def brighter(x: torch.Tensor, timesteps: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(sample=compute_model_target(schedule, x, clean + 0.5, timesteps))

    def apart(latents: torch.Tensor) -> torch.Tensor:
        return (latents - clean).mean((1, 2, 3))

    alone = compute_denoising_loss(brighter, schedule, clean, noise_sample=draw)
    share = compute_noise_level(schedule, torch.tensor([300, 600])).flatten()
    torch.testing.assert_close(
        compute_denoising_loss(brighter, schedule, clean, noise_sample=draw, aux_loss_fn=apart)
        - alone,
        0.5 * (1 - share),
        atol=1e-4,
        rtol=1e-3,
    )
    certain = (
        compute_denoising_loss(
            brighter, schedule, clean, noise_sample=draw, aux_loss_fn=apart, aux_loss_weight=0.2
        )
        - alone
    )
    torch.testing.assert_close(certain, torch.full((2,), 0.1), atol=1e-4, rtol=1e-3)
    each = (
        compute_denoising_loss(
            brighter,
            schedule,
            clean,
            noise_sample=draw,
            aux_loss_fn=apart,
            aux_loss_weight=torch.tensor([0.2, 0.0]),
        )
        - alone
    )
    torch.testing.assert_close(each, torch.tensor([0.1, 0.0]), atol=1e-4, rtol=1e-3)
