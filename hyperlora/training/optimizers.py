"""The optimiser set-ups the trainings share: AdamW, or Muon where it is worth its while."""

from collections.abc import Callable, Iterable
from math import cos, pi
from typing import Any, Final

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

BETAS: Final = (0.9, 0.99)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for the groups with ``muon`` true (Jordan et al. 2024); AdamW for those without.

    An update has the size of AdamW's (0.2 per number on the mean, 2502.16982, eq. 4), so both take the same rate.
    Kernels of convolutions are matrices of one row per output; ``torch.optim.Muon`` takes true matrices only.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
    ):
        super().__init__(
            param_groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for parameter in params:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(
                        self._compute_update(parameter, group["momentum"]), alpha=group["lr"]
                    )
            else:
                self._step_adamw(params, group)
        return loss

    def _compute_update(self, parameter: Tensor, momentum: float) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        momentum_buffer = (
            self.state[parameter]
            .setdefault("momentum", torch.zeros_like(gradient))
            .lerp_(gradient, 1 - momentum)
        )
        update = apply_newton_schulz(gradient.lerp(momentum_buffer, momentum).flatten(1))
        return update.view_as(gradient) * (0.2 * max(update.shape) ** 0.5)

    def _step_adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in params:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("mean", "square")}
                self.state[parameter].update(zeros, step=torch.zeros(()))
        exp_avgs, exp_avg_sqs, state_steps = (
            [self.state[p][name] for p in params] for name in ("mean", "square", "step")
        )
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            exp_avgs,
            exp_avg_sqs,
            [],
            state_steps,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def apply_newton_schulz(matrix: Tensor, num_steps: int = 5) -> Tensor:
    """Nearly U Vᵀ of ``matrix`` [rows, columns] = U S Vᵀ, by Newton and Schulz's iteration with Jordan's coefficients:
    all singular values come to between about 0.7 and 1.2."""
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    x = x.mT if is_tall else x
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.mT if is_tall else x).to(matrix)


def make_adamw_cosine(
    module: L.LightningModule,
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float = 0.01,
    warmup_ratio: float = 0.1,
) -> dict[str, Any]:
    """AdamW over the parameters that train; the rate rises for the fraction ``warmup_ratio`` of the trainer's steps, then
    falls to zero along a cosine. A run resumed with more steps goes on along the longer schedule."""
    trainable_params = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable_params, lr=lr, weight_decay=weight_decay, betas=BETAS)
    return _add_cosine_schedule(module, optimizer, warmup_ratio)


def split_muon_params(
    named_parameters: Iterable[tuple[str, nn.Parameter]], excluded_prefixes: tuple[str, ...]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Of named parameters the matrices and kernels within, for ``Muon``, and all others: vectors, and those whose names
    begin with one of ``excluded_prefixes``, where a network takes in and gives out."""
    matrices: list[nn.Parameter] = []
    other_params: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        (
            other_params if name.startswith(excluded_prefixes) or parameter.ndim == 1 else matrices
        ).append(parameter)
    return matrices, other_params


def make_muon_cosine(
    module: L.LightningModule,
    matrices: Iterable[nn.Parameter],
    other_params: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float = 0.01,
    warmup_ratio: float = 0.1,
) -> dict[str, Any]:
    """``Muon`` over hidden ``matrices`` and AdamW over the ``other_params`` that train, both along one cycle."""
    param_groups = [
        {"params": [p for p in matrices if p.requires_grad], "muon": True},
        {"params": [p for p in other_params if p.requires_grad], "muon": False},
    ]
    return _add_cosine_schedule(module, Muon(param_groups, lr, weight_decay), warmup_ratio)


def _add_cosine_schedule(
    module: L.LightningModule, optimizer: torch.optim.Optimizer, warmup_ratio: float
) -> dict[str, Any]:
    total_steps = int(module.trainer.estimated_stepping_batches)
    warmup_steps = max(1, int(warmup_ratio * total_steps))

    def compute_lr_factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return 0.5 + 0.5 * cos(
            pi * min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        )

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, compute_lr_factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
