"""What is noised can be undone, and the weight of a place counts as it says."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from hyperlora.objectives import clean_of, denoising_loss, noised

SCHEDULES = {
    **{kind: DDPMScheduler(prediction_type=kind) for kind in ("epsilon", "v_prediction", "sample")},
    "flow": FlowMatchEulerDiscreteScheduler(),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_target_leads_back_to_what_was_noised(name: str) -> None:
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    timesteps = torch.tensor([10, 400, 900, 500])
    x, target = noised(SCHEDULES[name], clean, noise, timesteps)
    assert not torch.allclose(x, clean, atol=0.1)
    torch.testing.assert_close(clean_of(SCHEDULES[name], x, target, timesteps), clean)


def test_a_weight_counts_places() -> None:
    clean, noise = torch.randn(2, 2, 3, 4, 4)
    draw = torch.tensor([0.3, 0.6]), noise

    def silent(x: torch.Tensor, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(sample=torch.zeros_like(x))

    schedule = SCHEDULES["epsilon"]
    corner = torch.zeros(4, 4)
    corner[0, 0] = 16.0
    weighted = denoising_loss(silent, schedule, clean, draw=draw, weight=corner)
    torch.testing.assert_close(weighted, noise[:, :, 0, 0].square().mean(1))
    plain = denoising_loss(silent, schedule, clean, draw=draw)
    torch.testing.assert_close(denoising_loss(silent, schedule, clean, draw=draw, weight=torch.ones(4, 4)), plain)
