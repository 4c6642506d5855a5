"""What the optimizer of a training module holds, without a trainer."""

from types import SimpleNamespace
from typing import Any

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
