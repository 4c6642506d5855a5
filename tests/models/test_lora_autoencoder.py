"""The convolutional autoencoder of LoRAs and the order of numbers that it sees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.lora_autoencoder import (
    LoraAutoencoder,
    compute_weight_preserved_loss,
    make_rank_major_permutation,
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


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
)
def test_make_rank_major_permutation_keeps_every_number_once(rank, shapes) -> None:
    layout = LoraLayout(
        tuple(TargetModule(f"unet.s{i}", *shape) for i, shape in enumerate(shapes)), rank, "tiny"
    )
    assert make_rank_major_permutation(layout).sort().values.tolist() == list(range(layout.numel))


def test_make_rank_major_permutation_joins_row_and_column_of_a_rank() -> None:
    weights = LoraWeights.unflatten(LAYOUT, torch.randn(LAYOUT.numel))
    sequence = weights.flatten()[make_rank_major_permutation(LAYOUT)]
    target = LAYOUT.targets[0]
    row = sequence[: target.in_features]
    column = sequence[target.in_features : target.in_features + target.out_features]
    assert torch.equal(row, weights.down[0][0]) and torch.equal(column, weights.up[0][:, 0])


@pytest.mark.parametrize("variational", [False, True])
def test_lora_autoencoder_learns_a_few_loras(variational) -> None:
    torch.manual_seed(0)
    rows = torch.randn(8, 3) @ torch.randn(3, LAYOUT.numel) / 3**0.5
    model = LoraAutoencoder(LAYOUT, (8, 16), latent_width=8, variational=variational)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        reconstruction, divergence = model(rows)
        loss = compute_weight_preserved_loss(reconstruction, rows, 1.0) + 1e-4 * divergence.mean()
        loss.backward()
        optimizer.step()
    model.eval()
    assert model.encode(rows).shape == (8, model.num_tokens, 8)
    assert (model(rows)[0] - rows).square().mean() < 0.1 * rows.square().mean()


def test_compute_weight_preserved_loss_weights_large_numbers_more() -> None:
    target = torch.tensor([[1.0, 0.1]])
    error_in_large, error_in_small = torch.tensor([[1.1, 0.1]]), torch.tensor([[1.0, 0.2]])
    assert compute_weight_preserved_loss(error_in_large, target, 0.0).allclose(
        compute_weight_preserved_loss(error_in_small, target, 0.0)
    )
    assert compute_weight_preserved_loss(
        error_in_large, target, 2.0
    ) > 2 * compute_weight_preserved_loss(error_in_small, target, 2.0)
