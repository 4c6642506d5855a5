"""Muon against torch's own Muon and AdamW."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from hyperlora.training.optimizers import Muon, apply_newton_schulz

ParameterPair = tuple[nn.Parameter, nn.Parameter]


def make_copies(*shape: int) -> ParameterPair:
    value = torch.randn(*shape)
    return nn.Parameter(value.clone()), nn.Parameter(value.clone())


def run_steps(
    pairs: Sequence[ParameterPair],
    optimizers: Sequence[torch.optim.Optimizer],
    num_steps: int = 5,
) -> None:
    """Step both parameters of each pair with the same random gradients."""
    for _ in range(num_steps):
        for parameter, reference in pairs:
            parameter.grad = torch.randn_like(parameter)
            reference.grad = parameter.grad.view_as(reference).clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_muon_steps_a_matrix_like_torch(shape) -> None:
    parameter, reference = make_copies(*shape)
    optimizers = [
        Muon([{"params": [parameter], "use_muon": True}], 1e-2, 0.1),
        torch.optim.Muon([reference], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    run_steps([(parameter, reference)], optimizers)
    torch.testing.assert_close(parameter, reference, atol=1e-6, rtol=1e-5)


def test_muon_steps_a_kernel_like_its_matrix() -> None:
    kernel, kernel_copy = make_copies(6, 4, 3, 3)
    matrix = nn.Parameter(kernel_copy.detach().flatten(1))
    optimizers = [Muon([{"params": [p], "use_muon": True}], 1e-2) for p in (kernel, matrix)]
    run_steps([(kernel, matrix)], optimizers)
    torch.testing.assert_close(kernel.flatten(1), matrix)


def test_muon_steps_other_groups_like_adamw() -> None:
    pairs = [make_copies(7), make_copies(3, 4)]
    optimizers = [
        Muon([{"params": [p for p, _ in pairs], "use_muon": False}], 1e-2, 0.1),
        torch.optim.AdamW(
            [reference for _, reference in pairs], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99)
        ),
    ]
    run_steps(pairs, optimizers)
    for parameter, reference in pairs:
        torch.testing.assert_close(parameter, reference, atol=1e-6, rtol=1e-5)


def test_apply_newton_schulz_keeps_singular_vectors() -> None:
    matrix = torch.randn(12, 30)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    orthogonal = apply_newton_schulz(matrix)
    assert torch.linalg.svdvals(orthogonal).sub(1).abs().max() < 0.4
    cosine = torch.cosine_similarity(orthogonal.flatten(), (u @ v).flatten(), dim=0)
    assert cosine > 0.95
