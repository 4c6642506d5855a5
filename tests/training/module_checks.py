"""What the optimizer of a training module holds and its validation logs, without a trainer."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

NUM_STEPS = 40


def configure_optimizer(module: Any) -> Optimizer:
    """The optimizer of a training of ``NUM_STEPS`` steps, after the warmup: at its peak rate."""
    module._trainer = SimpleNamespace(estimated_stepping_batches=NUM_STEPS)
    config = module.configure_optimizers()
    optimizer, scheduler = config["optimizer"], config["lr_scheduler"]["scheduler"]
    for _ in range(NUM_STEPS // 10):
        optimizer.step()
        scheduler.step()
    return optimizer


def list_parameter_ids(optimizer: Optimizer) -> set[int]:
    """The parameters of all groups."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def list_rates(optimizer: Optimizer) -> set[float]:
    """The learning rates of all groups."""
    return {group["lr"] for group in optimizer.param_groups}


def record_validation(
    module: Any, monkeypatch: pytest.MonkeyPatch, batch: Any, indices: Iterable[int]
) -> list[tuple[str, float, int]]:
    """Name, value and batch size that validation steps log, which keep training's random state."""
    logged: list[tuple[str, float, int]] = []

    def log(name: str, value: Any, *, batch_size: int, sync_dist: bool, prog_bar: bool) -> None:
        assert sync_dist, "each device sees a part of the validation data"
        logged.append((name, float(value), batch_size))

    monkeypatch.setattr(module, "log", log)
    before = torch.random.get_rng_state()
    for index in indices:
        module.validation_step(batch, index)
    assert torch.equal(torch.random.get_rng_state(), before), "training's own numbers go on"
    return logged
