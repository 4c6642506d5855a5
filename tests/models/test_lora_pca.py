"""Principal components of LoRAs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.models.lora_pca import (
    FactorwiseLoraPCA,
    LoraPCA,
    complete_basis,
    compute_principal_components,
)

LAYOUT = LoraLayout(
    (
        TargetModule("unet.a", 24, 40),
        TargetModule("unet.b", 6, 8),
        TargetModule("unet.c", 36, 16, (3, 3)),
    ),
    2,
    "tiny",
)


def test_lora_pca_reconstructs_rows_in_the_fitted_subspace() -> None:
    torch.manual_seed(0)
    rows = torch.randn(20, 4) @ torch.randn(4, LAYOUT.numel)
    for model in (
        LoraPCA(LAYOUT, num_tokens=2, latent_width=3),
        FactorwiseLoraPCA(LAYOUT, 2, 3, components_per_factor=5),
    ):
        model.fit(rows[:10])
        assert model.encode(rows).shape == (20, 2, 3)
        torch.testing.assert_close(
            model.decode(model.encode(rows[10:])), rows[10:], rtol=1e-3, atol=1e-3
        )
        assert model.compression == LAYOUT.numel / 6


@settings(deadline=None, database=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8))
def test_compute_principal_components_matches_the_svd(n, width, num_components) -> None:
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(n * 13 + width))
    components = compute_principal_components(rows, num_components)
    singular_values, exact = torch.linalg.svd(rows, full_matrices=False)[1:]
    num_exact = min(num_components, int((singular_values > 1e-3 * singular_values[0]).sum()))
    exact = exact[:num_exact]
    torch.testing.assert_close(
        rows @ components.mT @ components, rows @ exact.mT @ exact, rtol=1e-2, atol=1e-2
    )


def make_orthogonal_rows(num_rows: int, width: int, scales: list[float]) -> Tensor:
    """Rows whose singular values are ``scales``."""
    torch.manual_seed(4)
    left = torch.linalg.qr(torch.randn(num_rows, len(scales), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(width, len(scales), dtype=torch.float64)).Q
    return left * torch.tensor(scales) @ right.T


@pytest.mark.parametrize(("num_rows", "width"), [(9, 5), (5, 9), (6, 6)])
def test_components_are_in_order_and_without_rounding_errors(num_rows: int, width: int) -> None:
    """Variances 9, 4 and 4e-5 remain; 4e-6 is less than 1e-6 of the first."""
    rows = make_orthogonal_rows(num_rows, width, [2.0, 0.006, 3.0, 0.002])
    components = compute_principal_components(rows, 5)
    assert components.dtype == torch.float32 and components.shape == (5, width)
    deviations = (rows.float() @ components.T).square().sum(0).sqrt()
    expected = torch.tensor([3.0, 2.0, 0.006, 0.0, 0.0])
    torch.testing.assert_close(deviations, expected, atol=1e-5, rtol=1e-4)
    overlaps = components @ components.T
    torch.testing.assert_close(overlaps, torch.diag(torch.tensor([1.0, 1, 1, 0, 0])))
    assert compute_principal_components(rows, 2).shape == (2, width)


@pytest.mark.parametrize("is_wide", [True, False])
def test_min_variance_ratio_is_a_share_of_the_first_variance(is_wide: bool) -> None:
    rows = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    rows = rows if is_wide else torch.cat([rows, torch.zeros(2, 3)])
    for ratio, num_components in ((0.25, 1), (0.249, 2), (0.26, 1)):
        components = compute_principal_components(rows, 3, ratio)
        expected = torch.tensor([[0.0, 1, 0], [float(num_components == 2), 0, 0], [0, 0, 0]])
        torch.testing.assert_close(components.abs(), expected)


@pytest.mark.parametrize("model_class", [LoraPCA, FactorwiseLoraPCA])
def test_latents_are_coefficients_in_order_of_variance(model_class: type[LoraPCA]) -> None:
    """Token by token; the latents of fitted rows are uncorrelated, with falling variance."""
    torch.manual_seed(5)
    model = model_class(LAYOUT, 2, 3)
    assert model.encode(torch.randn(4, LAYOUT.numel)).count_nonzero() == 0
    rows = (
        torch.randn(12, 8) * torch.tensor([9, 8, 7, 6, 5, 4, 3, 2]) @ torch.randn(8, LAYOUT.numel)
    )
    model.fit(rows)
    latents = model.encode(rows).flatten(1)
    singular_values = torch.linalg.svdvals(rows)[:6]
    gram = latents.T @ latents / singular_values[0] ** 2
    expected = torch.diag(singular_values.square()) / singular_values[0] ** 2
    torch.testing.assert_close(gram, expected, atol=1e-3, rtol=1e-2)
    decoded = model.decode(model.encode(rows))
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(decoded, (u[:, :6] * s[:6]) @ vh[:6], atol=0.05, rtol=1e-2)


def test_factorwise_components_equal_their_formula() -> None:
    """u_f = x_f C_fᵀ, z = [u_1, u_2, ...] Jᵀ, and back by the transposes."""
    torch.manual_seed(6)
    model = FactorwiseLoraPCA(LAYOUT, 2, 3, components_per_factor=4)
    model.factor_components.normal_()
    model.joint_components.normal_()
    rows, latents = torch.randn(5, LAYOUT.numel), torch.randn(5, 2, 3)
    sizes = [48, 80, 12, 16, 72, 32]
    components = model.factor_components.split(sizes, 1)
    coefficients = [x @ c.T for x, c in zip(rows.split(sizes, 1), components, strict=True)]
    expected = torch.cat(coefficients, 1) @ model.joint_components.T
    torch.testing.assert_close(model.encode(rows).flatten(1), expected, atol=1e-3, rtol=1e-4)
    coefficients = (latents.flatten(1) @ model.joint_components).split(4, 1)
    decoded = torch.cat([u @ c for u, c in zip(coefficients, components, strict=True)], 1)
    torch.testing.assert_close(model.decode(latents), decoded, atol=1e-3, rtol=1e-4)


def test_default_configs() -> None:
    model = LoraPCA(LAYOUT)
    assert model.config == {"num_tokens": 16, "latent_width": 16}
    assert model.components.shape == (256, LAYOUT.numel) and not model.components.any()
    factorwise = FactorwiseLoraPCA(LAYOUT)
    assert factorwise.config == {
        "num_tokens": 8,
        "latent_width": 16,
        "components_per_factor": 20,
    }
    assert factorwise.joint_components.shape == (128, 120)
    assert not factorwise.joint_components.any() and not factorwise.factor_components.any()
    assert set(model.state_dict()) == {"components"}
    assert set(factorwise.state_dict()) == {"factor_components", "joint_components"}


def test_complete_basis_keeps_found_rows_and_leaves_rows_beyond_the_width_at_0() -> None:
    torch.manual_seed(7)
    found = torch.linalg.qr(torch.randn(5, 3)).Q.T
    basis = complete_basis(torch.cat([found, torch.zeros(4, 5)]))
    torch.testing.assert_close((basis[:3] @ found.T).abs(), torch.eye(3))
    expected = torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0, 0]))
    torch.testing.assert_close(basis @ basis.T, expected, atol=1e-5, rtol=1e-5)
    small = complete_basis(torch.tensor([[1e-3, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(small.abs(), torch.eye(2))
