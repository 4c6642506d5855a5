"""Optimizers and learning rate schedules that the training modules share."""

from collections.abc import Callable, Iterable
from math import cos, pi
from typing import TYPE_CHECKING, Any, Final, NotRequired, TypedDict

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

BETAS: Final = (0.9, 0.99)  # means over about 1 / (1 - β) = 10 and 100 steps
"""Decay rates of AdamW's moments."""


class ParamGroup(TypedDict):
    """A parameter group of ``Muon``; the optimizer fills in what is missing."""

    params: list[nn.Parameter]
    use_muon: bool
    lr: NotRequired[float]
    weight_decay: NotRequired[float]
    momentum: NotRequired[float]


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum (Jordan et al. 2024) for hidden matrices, AdamW for the rest.

    For a matrix W [rows, columns] with the gradient G, learning rate η and weight decay λ:

        M ← μ M + (1 - μ) G                                 momentum
        O = orthogonalize((1 - μ) G + μ M)                  Nesterov; see ``apply_newton_schulz``
        W ← (1 - η λ) W - η · 0.2 √max(rows, columns) O     2502.16982, eq. 4

    The factor gives an update the root mean square of AdamW's, so both share one learning rate.
    Convolution kernels are matrices with one row per output channel; ``torch.optim.Muon`` accepts
    matrices only.

    Args:
        param_groups: Groups with ``params`` and ``use_muon``. A group without Muon uses AdamW.
        lr: Peak learning rate η.
        weight_decay: λ, decoupled.
        momentum: μ.
    """

    def __init__(
        self,
        param_groups: list[ParamGroup],
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
    ) -> None:
        groups: list[dict[str, Any]] = [dict(group) for group in param_groups]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: Recomputes the loss and the gradients; None if these are there.

        Returns:
            The loss of ``closure``, or None without.
        """
        loss = None
        # a closure calls backward, which needs the gradients that no_grad switches off
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["use_muon"]:
                for parameter in params:
                    self._step_muon(
                        parameter, group["lr"], group["weight_decay"], group["momentum"]
                    )
            else:
                self._step_adamw(params, group["lr"], group["weight_decay"])
        return loss

    def _step_muon(
        self, parameter: Tensor, lr: float, weight_decay: float, momentum: float
    ) -> None:
        """Update one matrix or kernel [rows, ...]."""
        gradient = parameter.grad  # G [rows, ...], a kernel [out, in, kh, kw] for convolutions
        assert gradient is not None
        state = self.state[parameter]
        momentum_buffer = state.setdefault("momentum_buffer", torch.zeros_like(gradient))  # M
        momentum_buffer.lerp_(gradient, 1 - momentum)  # M ← μ M + (1 - μ) G
        # (1 - μ) G + μ M, [rows, columns]: Nesterov's momentum looks one step ahead
        nesterov_gradient = gradient.lerp(momentum_buffer, momentum).flatten(1)
        update = apply_newton_schulz(nesterov_gradient)  # O [rows, columns]
        # The min(rows, columns) singular values of O are about 1, so its root mean square is
        # √(min / (rows · columns)) = 1 / √max. The factor makes that 0.2, as AdamW's usually is.
        update = update.view_as(gradient) * (0.2 * max(update.shape) ** 0.5)
        # decay before the update and outside of M: decoupled, as in AdamW (1711.05101)
        parameter.mul_(1 - lr * weight_decay)
        parameter.sub_(update, alpha=lr)

    def _step_adamw(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        """Update parameters of any shape with torch's AdamW."""
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "exp_avg": torch.zeros_like(parameter),  # m, mean of the gradients
                    "exp_avg_sq": torch.zeros_like(parameter),  # v, mean of their squares
                    "step": torch.zeros(()),  # for the bias correction of both
                }
        states = [self.state[parameter] for parameter in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],  # largest v so far, for amsgrad only
            [state["step"] for state in states],
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=1e-8,
            maximize=False,
        )


def apply_newton_schulz(matrix: Tensor, num_steps: int = 5) -> Tensor:
    """Compute nearly U Vᵀ of a matrix U S Vᵀ by the Newton-Schulz iteration.

    Each step applies p(s) = a s + b s³ + c s⁵ to the singular values s, without computing them:

        A = X Xᵀ,   X ← a X + (b A + c A²) X

    Jordan's coefficients a = 3.4445, b = -4.775, c = 2.0315 bring all s from [0.002, 1] to
    [0.68, 1.21] in five steps. Smaller s grow by a factor of a per step.

    Args:
        matrix: [rows, columns].
        num_steps: Iterations, in bfloat16.

    Returns:
        [rows, columns], in the dtype of ``matrix``.
    """
    x = matrix.bfloat16()  # rounding by 0.4 % does not matter where s ends in [0.68, 1.21]
    x = x / (x.norm() + 1e-7)  # the Frobenius norm bounds s by 1; p diverges for large s
    is_tall = x.shape[0] > x.shape[1]
    x = x.mT if is_tall else x  # at least as many columns as rows: the smaller X Xᵀ
    for _ in range(num_steps):
        gram = x @ x.mT  # A [rows, rows]
        polynomial = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)  # b A + c A²
        # (b A + c A²) U S Vᵀ = U (b S³ + c S⁵) Vᵀ: U and V stay, only s changes
        x = torch.addmm(x, polynomial, x, beta=3.4445)  # a X + (b A + c A²) X
    return (x.mT if is_tall else x).to(matrix)  # (V Uᵀ)ᵀ = U Vᵀ


def make_adamw_cosine(
    module: L.LightningModule,
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float = 0.01,
    warmup_ratio: float = 0.1,
) -> "OptimizerLRSchedulerConfig":
    """Make AdamW with linear warmup and cosine decay to zero.

    A run that is resumed with more steps continues on the longer schedule.

    Args:
        module: Attached to the trainer whose number of steps sets the schedule's length.
        parameters: Those without ``requires_grad`` are left out.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        warmup_ratio: Fraction of all steps in which the rate rises.

    Returns:
        What ``configure_optimizers`` returns.
    """
    trainable_params = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable_params, lr=lr, weight_decay=weight_decay, betas=BETAS)
    return _add_cosine_schedule(module, optimizer, warmup_ratio)


def split_muon_params(
    named_parameters: Iterable[tuple[str, nn.Parameter]], excluded_prefixes: tuple[str, ...]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split parameters into hidden matrices, for ``Muon``, and all others.

    Args:
        named_parameters: As ``nn.Module.named_parameters`` yields them.
        excluded_prefixes: Prefixes of names that are no hidden matrices: input and output layers.

    Returns:
        Matrices and kernels; then vectors and excluded parameters.
    """
    matrices: list[nn.Parameter] = []
    other_params: list[nn.Parameter] = []
    # Jordan et al. advise AdamW for vectors and for input and output layers
    for name, parameter in named_parameters:
        is_hidden_matrix = parameter.ndim != 1 and not name.startswith(excluded_prefixes)
        (matrices if is_hidden_matrix else other_params).append(parameter)
    return matrices, other_params


def make_muon_cosine(
    module: L.LightningModule,
    matrices: Iterable[nn.Parameter],
    other_params: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float = 0.01,
    warmup_ratio: float = 0.1,
) -> "OptimizerLRSchedulerConfig":
    """Make ``Muon`` with linear warmup and cosine decay to zero.

    Args:
        module: Attached to the trainer whose number of steps sets the schedule's length.
        matrices: Hidden matrices and kernels, for Muon.
        other_params: All other parameters, for AdamW. Of both, those without ``requires_grad`` are
            left out.
        lr: Peak learning rate of both.
        weight_decay: Decoupled weight decay of both.
        warmup_ratio: Fraction of all steps in which the rate rises.

    Returns:
        What ``configure_optimizers`` returns.
    """
    param_groups: list[ParamGroup] = [
        {"params": [p for p in matrices if p.requires_grad], "use_muon": True},
        {"params": [p for p in other_params if p.requires_grad], "use_muon": False},
    ]
    return _add_cosine_schedule(module, Muon(param_groups, lr, weight_decay), warmup_ratio)


def _add_cosine_schedule(
    module: L.LightningModule, optimizer: torch.optim.Optimizer, warmup_ratio: float
) -> "OptimizerLRSchedulerConfig":
    """Add warmup and cosine decay over the trainer's steps to an optimizer."""
    # optimizer steps: batches divided by those that accumulate gradients
    total_steps = int(module.trainer.estimated_stepping_batches)
    warmup_steps = max(1, int(warmup_ratio * total_steps))

    def compute_lr_factor(step: int) -> float:
        """Compute the share of the peak learning rate."""
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)  # + 1: step 0 is not lost at a rate of 0
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)  # from 0 to 1
        return 0.5 + 0.5 * cos(pi * min(1.0, progress))  # from 1 to 0; beyond the end it stays 0

    # LambdaLR saves no function: a resumed run uses the length of its own schedule
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, compute_lr_factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
