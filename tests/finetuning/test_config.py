"""Settings of fine-tuning and refinement: their limits, the learning rate, the steps."""

from math import cos, inf, nan, pi
from typing import Any

import pytest

from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.config import FineTuneConfig, RefineConfig
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.seeds import MAX_SEED

LAYOUT = LoraLayout((TargetModule("unet.a", 6, 5), TargetModule("unet.b", 3, 4)), 2, "tiny")


def test_fine_tune_config_accepts_the_limits() -> None:
    FineTuneConfig(num_steps=0, lr=0, batch_size=1, lr_warmup_steps=0, seeds=(0, MAX_SEED))
    FineTuneConfig(num_steps=1, lr=0.1, num_paired_groups=2, shift=1e-3, snr_gamma=1e-3)
    FineTuneConfig(num_steps=1, lr=0.1, shift=0.5, snr_gamma=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr must be 0 or more and finite"),
        ({"lr": inf}, "lr must be 0 or more and finite"),
        ({"shift": inf}, "shift must be above 0 and finite"),
        ({"shift": nan}, "shift must be above 0 and finite"),
        ({"shift": -1.0}, "shift must be above 0 and finite"),
        ({"snr_gamma": inf}, "snr_gamma must be above 0 and finite"),
        ({"snr_gamma": -2.0}, "snr_gamma must be above 0 and finite"),
        ({"seeds": [3, -1]}, "seed from 0 to"),
        ({"seeds": [MAX_SEED + 1]}, "seed from 0 to"),
        ({"seeds": [], "num_paired_groups": 2}, "exclude each other"),
    ],
)
def test_fine_tune_config_refuses_values_beyond_the_limits(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        FineTuneConfig(**({"num_steps": 1, "lr": 1e-3} | options))


@pytest.mark.parametrize("lr_scheduler", ["linear", "cosine"])
def test_learning_rate_falls_to_0_after_the_last_step(lr_scheduler: Any) -> None:
    config = FineTuneConfig(num_steps=5, lr=2.0, lr_scheduler=lr_scheduler, lr_warmup_steps=2)
    last = 2 / 3 if lr_scheduler == "linear" else 1 + cos(2 / 3 * pi)  # 2 of 3 steps are done
    assert config.compute_lr(5) == pytest.approx(last)
    assert config.compute_lr(6) == pytest.approx(0)


def test_warmup_may_take_all_steps() -> None:
    config = FineTuneConfig(num_steps=2, lr=1.5, lr_scheduler="linear", lr_warmup_steps=2)
    assert [config.compute_lr(step) for step in (1, 2, 3, 4)] == pytest.approx([0.5, 1, 1.5, 0])


def test_iterate_steps_with_a_progress_bar_yields_the_same_steps() -> None:
    calls: list[int] = []
    config = FineTuneConfig(num_steps=3, lr=0, progress_label="fit", on_step=calls.append)
    assert list(config.iterate_steps()) == calls == [1, 2, 3]


@pytest.mark.parametrize("name", ["rank", "out_rank", "resolution"])
def test_refine_config_needs_sizes_of_at_least_1(name: str) -> None:
    RefineConfig(**{name: 1})  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=f"{name} must be at least 1, got 0"):
        RefineConfig(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "num_steps must be 0 or more"),
        ({"lr": -1.0}, "lr must be 0 or more"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed from 0 to"),
    ],
)
def test_refine_config_refuses_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        RefineConfig(**options)


@pytest.mark.parametrize("name", ["rank", "out_rank"])
def test_check_ranks_refuses_what_no_target_has(name: str) -> None:
    """The targets have at most rank 5 and 3."""
    RefineConfig().check_ranks(LAYOUT)
    RefineConfig(**{name: 5}).check_ranks(LAYOUT)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=rf"^{name}\b"):
        RefineConfig(**{name: 6}).check_ranks(LAYOUT)  # type: ignore[arg-type]


def test_refine_config_hands_its_settings_to_the_optimization() -> None:
    calls: list[int] = []
    config = RefineConfig(
        num_steps=7, lr=0.5, batch_size=3, progress_label="refine", on_step=calls.append
    )
    assert config.fine_tune == FineTuneConfig(
        num_steps=7, lr=0.5, batch_size=3, progress_label="refine", on_step=calls.append
    )
