"""Principal components of LoRAs."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.models.lora_pca import FactorwiseLoraPCA, LoraPCA, compute_principal_components

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
