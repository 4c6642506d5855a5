"""``LoraNormalizer``: statistics of all rows in one pass, and the canonical form of equal ΔW."""

import pytest
import torch

from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.normalization import LoraNormalizer, canonicalize_rows
from hyperlora.lora.weights import LoraWeights

LAYOUT = LoraLayout((TargetModule("unet.a", 3, 5), TargetModule("unet.b", 4, 2)), 2, "tiny")
FACTOR_SIZES = [6, 10, 8, 4]


def make_rows(num_rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(28, generator=generator) + 0.1
    return torch.randn(num_rows, 28, generator=generator) * scales + 4 * scales


@pytest.mark.parametrize("sizes", [(9,), (1, 5, 3), (2, 7)])
@pytest.mark.parametrize("per_factor", [False, True])
def test_fit_equals_mean_and_deviation_of_all_rows(
    sizes: tuple[int, ...], per_factor: bool
) -> None:
    """√mean (x - mean)² per number, or of all numbers of a factor together."""
    rows = make_rows(9)
    normalizer = LoraNormalizer.fit(LAYOUT, rows.split(sizes), per_factor=per_factor)
    variance = (rows - rows.mean(0)).square().mean(0)
    if per_factor:
        variance = torch.cat([v.mean().repeat(len(v)) for v in variance.split(FACTOR_SIZES)])
    torch.testing.assert_close(normalizer.mean, rows.mean(0))
    torch.testing.assert_close(normalizer.std, variance.sqrt())
    assert normalizer.mean.dtype == torch.float32 and not normalizer.canonical
    normalized = normalizer.normalize(rows.double())
    expected = ((rows - normalizer.mean) / normalizer.std).float()
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized, expected)
    torch.testing.assert_close(normalizer.denormalize(normalized), rows)


def test_fit_keeps_the_digits_of_small_deviations() -> None:
    """Deviations of 1e-3 around 100, which x² in float32 would lose."""
    rows = 100 + 1e-3 * make_rows(40).double()
    normalizer = LoraNormalizer.fit(LAYOUT, rows.split(7))
    expected = rows.std(0, correction=0).float()
    torch.testing.assert_close(normalizer.std, expected, rtol=1e-5, atol=0)


def test_numbers_that_hardly_vary_have_a_deviation_of_1() -> None:
    """Up to 2⁻²⁴, the smallest number of float16."""
    signs = torch.tensor([[1.0], [-1.0]]).double()
    rows = signs * torch.full((28,), 2.0**-24).double()
    rows[:, 1] *= 2
    rows[:, 2] = 3
    normalizer = LoraNormalizer.fit(LAYOUT, [rows])
    assert normalizer.std[:4].tolist() == [1, 2.0**-23, 1, 1]
    assert normalizer.mean[:3].tolist() == [0, 0, 3]
    empty = LoraNormalizer.fit(LAYOUT, [])
    assert empty.std.tolist() == [1] * 28 and empty.mean.tolist() == [0] * 28


def test_unfitted_normalizer_changes_nothing() -> None:
    normalizer, rows = LoraNormalizer(LAYOUT), make_rows(3)
    assert torch.equal(normalizer.normalize(rows), rows) and normalizer.layout is LAYOUT
    assert set(normalizer.state_dict()) == {"mean", "std"}
    canonical = LoraNormalizer(LAYOUT, canonical=True)
    torch.testing.assert_close(canonical.normalize(rows), canonicalize_rows(LAYOUT, rows))
    fitted = LoraNormalizer.fit(LAYOUT, rows.split(2), canonical=True)
    torch.testing.assert_close(fitted.mean, canonicalize_rows(LAYOUT, rows).mean(0))
    assert fitted.canonical and fitted.layout is LAYOUT


def test_canonical_factors_have_equal_singular_values_and_positive_largest_numbers() -> None:
    rows = make_rows(6).view(2, 3, 28).half()
    canonical = LoraWeights.unflatten(LAYOUT, canonicalize_rows(LAYOUT, rows))
    originals = LoraWeights.unflatten(LAYOUT, rows.float()).get_delta_weights()
    factors = zip(canonical.down, canonical.up, originals, strict=True)
    for down, up, delta in factors:
        torch.testing.assert_close(up @ down, delta, atol=1e-3, rtol=1e-3)
        values = torch.linalg.svdvals(delta)[..., :2]
        torch.testing.assert_close(down @ down.mT, torch.diag_embed(values), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(up.mT @ up, torch.diag_embed(values), atol=1e-3, rtol=1e-3)
        largest = up.abs().amax(-2)
        assert torch.equal(largest, up.amax(-2))
    zeros = torch.zeros(2, 28)
    assert torch.equal(canonicalize_rows(LAYOUT, zeros), zeros)
