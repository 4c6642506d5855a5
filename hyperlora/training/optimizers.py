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

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float = 0.01, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            learned = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for parameter in learned:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(self._direction(parameter, group["momentum"]), alpha=group["lr"])
            else:
                self._adamw(learned, group)
        return loss

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        mean = self.state[parameter].setdefault("momentum", torch.zeros_like(gradient)).lerp_(gradient, 1 - momentum)
        update = orthogonal(gradient.lerp(mean, momentum).flatten(1))
        return update.view_as(gradient) * (0.2 * max(update.shape) ** 0.5)

    def _adamw(self, learned: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in learned:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("mean", "square")}
                self.state[parameter].update(zeros, step=torch.zeros(()))
        means, squares, steps = ([self.state[p][name] for p in learned] for name in ("mean", "square", "step"))
        adamw(
            learned, [p.grad for p in learned if p.grad is not None], means, squares, [], steps, amsgrad=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=group["lr"], weight_decay=group["weight_decay"], eps=1e-8,
            maximize=False,
        )  # fmt: skip


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearly U Vᵀ of ``matrix`` [rows, columns] = U S Vᵀ, by Newton and Schulz's iteration with Jordan's coefficients:
    all singular values come to between about 0.7 and 1.2."""
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    for _ in range(steps):
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrix)


def adamw_one_cycle(
    module: L.LightningModule,
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
) -> dict[str, Any]:
    """AdamW over the parameters that train; the rate rises for the fraction ``warmup`` of the trainer's steps, then
    falls to zero along a cosine. A run resumed with more steps goes on along the longer schedule."""
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, betas=BETAS)
    return _one_cycle(module, optimizer, warmup)


def hidden_matrices(
    parameters: Iterable[tuple[str, nn.Parameter]], ends: tuple[str, ...]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Of named parameters the matrices and kernels within, for ``Muon``, and all others: vectors, and those whose names
    begin with one of ``ends``, where a network takes in and gives out."""
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters:
        (others if name.startswith(ends) or parameter.ndim == 1 else hidden).append(parameter)
    return hidden, others


def muon_one_cycle(
    module: L.LightningModule,
    matrices: Iterable[nn.Parameter],
    others: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
) -> dict[str, Any]:
    """``Muon`` over hidden ``matrices`` and AdamW over the ``others`` that train, both along one cycle."""
    groups = [{"params": [p for p in matrices if p.requires_grad], "muon": True},
              {"params": [p for p in others if p.requires_grad], "muon": False}]  # fmt: skip
    return _one_cycle(module, Muon(groups, lr, weight_decay), warmup)


def _one_cycle(module: L.LightningModule, optimizer: torch.optim.Optimizer, warmup: float) -> dict[str, Any]:
    steps = int(module.trainer.estimated_stepping_batches)
    rising = max(1, int(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 + 0.5 * cos(pi * min(1.0, (step - rising) / max(1, steps - rising)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
