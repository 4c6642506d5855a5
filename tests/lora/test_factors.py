"""Factors of low rank, against torch's SVD of the whole matrix."""

import pytest
import torch
from torch import Tensor

from hyperlora.lora.factors import (
    compute_low_rank_factors,
    compute_truncated_svd,
    pad_factors,
    resize_factors,
)


def make_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def truncate(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (2, 3, 7, 4)])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_truncated_svd_has_the_largest_values(shape: tuple[int, ...], rank: int) -> None:
    matrix = make_matrix(*shape)
    u, root, vh = compute_truncated_svd(matrix, rank)
    num_values = min(rank, *shape[-2:])
    assert u.shape == (*shape[:-1], num_values) and vh.shape == (*shape[:-2], num_values, shape[-1])
    torch.testing.assert_close(root.square(), torch.linalg.svdvals(matrix)[..., :num_values])
    reconstruction = (u * root.square()[..., None, :]) @ vh
    torch.testing.assert_close(reconstruction, truncate(matrix, rank), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (2, 3, 7, 4)])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_low_rank_factors_share_the_singular_values(shape: tuple[int, ...], rank: int) -> None:
    matrix = make_matrix(*shape)
    left, right = compute_low_rank_factors(matrix, rank)
    assert left.shape == (*shape[:-1], rank) and right.shape == (*shape[:-2], rank, shape[-1])
    torch.testing.assert_close(left @ right, truncate(matrix, rank), atol=1e-5, rtol=1e-4)
    values = torch.nn.functional.pad(torch.linalg.svdvals(matrix), (0, rank))[..., :rank]
    expected = torch.diag_embed(values)
    torch.testing.assert_close(left.mT @ left, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(right @ right.mT, expected, atol=1e-5, rtol=1e-4)


def test_pad_factors_appends_zeros() -> None:
    down, up = make_matrix(2, 3, 5), make_matrix(2, 4, 3, seed=1)
    padded_down, padded_up = pad_factors(down, up, 5)
    assert torch.equal(padded_down, torch.cat([down, torch.zeros(2, 2, 5)], 1))
    assert torch.equal(padded_up, torch.cat([up, torch.zeros(2, 4, 2)], 2))
    assert all(map(torch.equal, pad_factors(down, up, 3), (down, up)))


@pytest.mark.parametrize(("size_in", "size_out", "rank"), [(9, 7, 4), (3, 8, 5), (8, 3, 5)])
@pytest.mark.parametrize("new_rank", [2, 5, 10])
def test_resize_factors_is_the_truncated_product(
    size_in: int, size_out: int, rank: int, new_rank: int
) -> None:
    down, up = make_matrix(2, rank, size_in), make_matrix(2, size_out, rank, seed=1)
    new_down, new_up = resize_factors(down, up, new_rank)
    assert new_down.shape == (2, new_rank, size_in) and new_up.shape == (2, size_out, new_rank)
    expected = truncate(up @ down, new_rank)
    torch.testing.assert_close(new_up @ new_down, expected, atol=1e-4, rtol=1e-4)
    grams = new_down @ new_down.mT, new_up.mT @ new_up
    torch.testing.assert_close(*grams, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_resize_factors_keeps_the_precision(dtype: torch.dtype) -> None:
    down, up = make_matrix(3, 6).to(dtype), make_matrix(5, 3, seed=1).to(dtype)
    new_down, new_up = resize_factors(down, up, 4)
    assert new_down.dtype == new_up.dtype == dtype
    delta = new_up.float() @ new_down.float()
    torch.testing.assert_close(delta, up.float() @ down.float(), atol=0.05, rtol=0.05)
