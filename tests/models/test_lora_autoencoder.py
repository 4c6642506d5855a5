"""The convolutional autoencoder of LoRAs: its start, what it learns, and its loss."""

import pytest
import torch
from torch import Tensor

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.models.lora_autoencoder import (
    LoraAutoencoder,
    compute_weight_preserved_loss,
)
from hyperlora.models.lora_pca import FactorwiseLoraPCA, complete_basis
from hyperlora.models.lora_projections import list_factor_kinds

LAYOUT = LoraLayout(
    (
        TargetModule("unet.blocks.0.a", 24, 40),
        TargetModule("unet.blocks.1.a", 24, 40),
        TargetModule("unet.b", 6, 8),
        TargetModule("unet.c", 36, 16, (3, 3)),
        TargetModule("unet.d", 30, 10),
    ),
    2,
    "tiny",
)
SIZES = {"directions_per_factor": 6, "factors_per_token": 4, "latent_width": 12, "width": 16}


def make_rows(num_rows: int, num_directions: int = 3) -> Tensor:
    """Draw LoRAs of mean 0 in a few directions."""
    torch.manual_seed(0)
    rows = torch.randn(num_rows, num_directions) @ torch.randn(num_directions, LAYOUT.numel)
    return (rows - rows.mean(0)) / num_directions**0.5


def compute_relative_error(model: LoraAutoencoder | FactorwiseLoraPCA, rows: Tensor) -> float:
    with torch.no_grad():
        error = model.decode(model.encode(rows)) - rows
    return float(error.square().mean() / rows.square().mean())


@pytest.mark.parametrize("share_directions", [False, True])
def test_fit_starts_at_principal_components(share_directions: bool) -> None:
    rows = make_rows(30)
    model = LoraAutoencoder(LAYOUT, **SIZES, share_directions=share_directions)
    assert compute_relative_error(model, rows) > 0.3
    model.fit(rows)
    # three directions: six of each kind of factor hold them, and twelve of each token
    assert compute_relative_error(model, rows) < 1e-6


def test_fit_equals_factorwise_principal_components() -> None:
    rows = make_rows(40, 30)
    # one token of all factors: the two-step PCA
    model = LoraAutoencoder(
        LAYOUT, directions_per_factor=4, factors_per_token=10, latent_width=8, depth=1
    )
    pca = FactorwiseLoraPCA(LAYOUT, 1, 8, components_per_factor=4)
    model.fit(rows)
    pca.fit(rows)
    assert model.compression == pca.compression == LAYOUT.numel / 8
    torch.testing.assert_close(
        model.decode(model.encode(rows)), pca.decode(pca.encode(rows)), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("share_directions", [False, True])
def test_training_learns_what_components_miss(variational: bool, share_directions: bool) -> None:
    """Tokens of two numbers hold three directions only where neighbors help."""
    rows = make_rows(8)
    sizes = {**SIZES, "latent_width": 1, "variational": variational, "kernel_size": 3}
    model = LoraAutoencoder(LAYOUT, **sizes, share_directions=share_directions)
    model.fit(rows)
    before = compute_relative_error(model, rows)
    assert before > 0.3
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        reconstruction, divergence = model(rows)
        loss = compute_weight_preserved_loss(reconstruction, rows, 1.0) + 1e-4 * divergence.mean()
        loss.backward()
        optimizer.step()
    model.eval()
    assert model.encode(rows).shape == (8, 3, 1)
    assert all(p.grad is not None for p in model.parameters())
    assert compute_relative_error(model, rows) < before / 3


@pytest.mark.parametrize("num_rows", [2, 4, 7])
def test_complete_basis_is_orthonormal_and_keeps_what_was_found(num_rows: int) -> None:
    torch.manual_seed(0)
    found = torch.linalg.qr(torch.randn(5, 2)).Q.mT
    basis = complete_basis(torch.cat([found, torch.zeros(num_rows - 2, 5)]))
    num_directions = min(num_rows, 5)
    torch.testing.assert_close(basis[:2].abs(), found.abs())
    torch.testing.assert_close(
        basis[:num_directions] @ basis[:num_directions].mT, torch.eye(num_directions)
    )
    assert basis.shape == (num_rows, 5) and not basis[num_directions:].any()


def test_more_directions_than_numbers_lose_nothing() -> None:
    rows = make_rows(50, 40)
    model = LoraAutoencoder(LAYOUT, directions_per_factor=200, latent_width=400)
    model.fit(rows)
    assert compute_relative_error(model, rows) < 1e-6


def test_depth_0_is_linear() -> None:
    rows = make_rows(8)
    model = LoraAutoencoder(LAYOUT, **SIZES, depth=0)
    torch.testing.assert_close(model.encode(rows * 2), model.encode(rows) * 2)


def test_list_factor_kinds_joins_paths_that_differ_in_numbers() -> None:
    own, by_kind = (list_factor_kinds(LAYOUT, shared) for shared in (False, True))
    assert len(set(own)) == 10 and len(set(by_kind)) == 8
    assert by_kind[0] == by_kind[2] != by_kind[1] == by_kind[3]
    mixed = LoraLayout(
        (TargetModule("unet.0.a", 3, 4), TargetModule("unet.1.a", 5, 4)), 1, "other sizes"
    )
    assert len(set(list_factor_kinds(mixed, by_kind=True))) == 3


def test_compute_weight_preserved_loss_equals_its_formula() -> None:
    target = torch.tensor([[1.0, -0.1], [2.0, 4.0]])
    reconstruction = torch.tensor([[1.1, -0.1], [2.0, 3.0]])
    # λ = 2: weights 3 and 1.2, then 2 and 3
    expected = (3 * 0.1**2 + 3 * 1.0**2) / 4
    loss = compute_weight_preserved_loss(reconstruction, target, 2.0)
    torch.testing.assert_close(loss, torch.tensor(expected))
    plain = compute_weight_preserved_loss(reconstruction, target, 0.0)
    torch.testing.assert_close(plain, (reconstruction - target).square().mean())


@pytest.mark.parametrize("variational", [False, True])
def test_decoder_alone_decodes_the_same(variational: bool) -> None:
    model = LoraAutoencoder(LAYOUT, **SIZES, variational=variational)
    model.fit(make_rows(20))
    latents = model.encode(make_rows(3))
    expected = model.decode(latents)
    model.drop_encoder()
    assert not [name for name in model.state_dict() if "encoder" in name or "logvar" in name]
    loaded = LoraAutoencoder(LAYOUT, **model.config)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded.decode(latents), expected)
    with pytest.raises(InvalidArgumentError, match="only decodes: use the codec"):
        loaded.encode(make_rows(3))
