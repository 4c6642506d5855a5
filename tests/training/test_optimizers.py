"""Muon against torch's own Muon and AdamW."""

import pytest
import torch
from torch import nn

from hyperlora.training.optimizers import Muon, apply_newton_schulz


def _copies(*shape: int) -> tuple[nn.Parameter, nn.Parameter]:
    value = torch.randn(*shape)
    return nn.Parameter(value.clone()), nn.Parameter(value.clone())


def _steps(pairs, optimizers, count: int = 5) -> None:
    for _ in range(count):
        for mine, reference in pairs:
            mine.grad = torch.randn_like(mine)
            reference.grad = mine.grad.view_as(reference).clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_a_matrix_goes_where_muon_of_torch_takes_it(shape):
    mine, reference = _copies(*shape)
    optimizers = [
        Muon([{"params": [mine], "muon": True}], 1e-2, 0.1),
        torch.optim.Muon([reference], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    _steps([(mine, reference)], optimizers)
    torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-5)


def test_a_kernel_goes_where_its_matrix_goes():
    kernel, matrix = _copies(6, 4, 3, 3)
    flat = nn.Parameter(matrix.detach().flatten(1))
    optimizers = [Muon([{"params": [p], "muon": True}], 1e-2) for p in (kernel, flat)]
    _steps([(kernel, flat)], optimizers)
    torch.testing.assert_close(kernel.flatten(1), flat)


def test_the_others_go_where_adamw_takes_them():
    pairs = [_copies(7), _copies(3, 4)]
    optimizers = [
        Muon([{"params": [mine for mine, _ in pairs], "muon": False}], 1e-2, 0.1),
        torch.optim.AdamW(
            [reference for _, reference in pairs], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99)
        ),
    ]
    _steps(pairs, optimizers)
    for mine, reference in pairs:
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-5)


def test_what_is_orthogonal_keeps_its_directions():
    matrix = torch.randn(12, 30)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    made = apply_newton_schulz(matrix)
    assert torch.linalg.svdvals(made).sub(1).abs().max() < 0.4
    similar = torch.cosine_similarity(made.flatten(), (u @ v).flatten(), dim=0)
    assert similar > 0.95
