"""The algebra of LoRAs, against explicit ΔW and torch's own SVD."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperlora.errors import LayoutMismatchError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights

LAYOUT = LoraLayout(
    (
        TargetModule("unet.a", 7, 5),
        TargetModule("unet.b", 18, 6, (3, 3)),
        TargetModule("unet.c", 3, 9),
    ),
    2,
    "base",
)
BATCHES = st.sampled_from([(), (1,), (3,), (2, 3)])
SEEDS = st.integers(0, 2**31)


def random_lora(seed: int, batch: tuple[int, ...] = (), layout: LoraLayout = LAYOUT) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights.unflatten(layout, torch.randn(*batch, layout.numel, generator=generator))


def assert_same_delta(
    lora: LoraWeights, expected_deltas: list[torch.Tensor], tolerance: float = 1e-5
) -> None:
    for delta, expected in zip(lora.get_delta_weights(), expected_deltas, strict=True):
        torch.testing.assert_close(delta, expected, atol=tolerance, rtol=tolerance)


@given(SEEDS, BATCHES)
def test_unflatten_inverts_flatten(seed: int, batch: tuple[int, ...]) -> None:
    lora = random_lora(seed, batch)
    restored = LoraWeights.unflatten(LAYOUT, lora.flatten())
    assert restored.batch_shape == batch
    assert all(map(torch.equal, (*restored.down, *restored.up), (*lora.down, *lora.up)))


def test_flatten_follows_layout_order_down_then_up() -> None:
    flat = torch.arange(LAYOUT.numel, dtype=torch.float32)
    lora = LoraWeights.unflatten(LAYOUT, flat)
    assert torch.equal(lora.down[0], flat[:14].reshape(2, 7))
    assert torch.equal(lora.up[0], flat[14:24].reshape(5, 2))
    assert torch.equal(lora.down[1], flat[24:60].reshape(2, 18))


@given(SEEDS, st.integers(1, 4))
def test_iteration_inverts_stack(seed: int, n: int) -> None:
    loras = [random_lora(seed + i) for i in range(n)]
    stacked = LoraWeights.stack(loras)
    assert len(stacked) == n
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(stacked, loras, strict=True))


@given(SEEDS, BATCHES, st.floats(-3, 3))
def test_operators_act_on_delta_weights(seed: int, batch: tuple[int, ...], k: float) -> None:
    a, b = random_lora(seed, batch), random_lora(seed + 1, batch)
    result = k * a + b - 2 * b
    assert result.layout.rank == 6
    assert_same_delta(
        result,
        [k * x - y for x, y in zip(a.get_delta_weights(), b.get_delta_weights(), strict=True)],
        1e-4,
    )


def test_mul_scales_each_lora_of_a_batch() -> None:
    lora = random_lora(0, (3,))
    strengths = torch.tensor([0.0, 1.0, -2.0])
    assert_same_delta(
        lora * strengths, [d * strengths[:, None, None] for d in lora.get_delta_weights()]
    )


@given(SEEDS, BATCHES)
def test_compute_delta_norms_equals_frobenius_norms(seed: int, batch: tuple[int, ...]) -> None:
    lora = random_lora(seed, batch)
    expected = torch.stack([torch.linalg.matrix_norm(d) for d in lora.get_delta_weights()], -1)
    torch.testing.assert_close(lora.compute_delta_norms(), expected, rtol=1e-4, atol=1e-5)


@given(SEEDS, BATCHES, st.integers(1, 6))
def test_resize_is_the_best_approximation(seed: int, batch: tuple[int, ...], rank: int) -> None:
    lora = random_lora(seed, batch, LAYOUT.with_rank(4))
    resized = lora.resize(rank)
    assert resized.layout.rank == rank
    best = []
    for delta in lora.get_delta_weights():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        best.append((u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :])
    assert_same_delta(resized, best, 1e-3)


@given(SEEDS)
def test_canonicalize_gives_equal_singular_values_for_any_gauge(seed: int) -> None:
    lora = random_lora(seed)
    canonical = lora.canonicalize()
    assert_same_delta(canonical, list(lora.get_delta_weights()), 1e-4)
    for down, up in zip(canonical.down, canonical.up, strict=True):
        torch.testing.assert_close(down @ down.mT, up.mT @ up, atol=1e-3, rtol=1e-3)
    gauge = torch.tensor([[2.0, 1.0], [0.5, -1.0]])
    rotated = LoraWeights(
        LAYOUT, tuple(gauge @ d for d in lora.down), tuple(u @ gauge.inverse() for u in lora.up)
    )
    for down, expected in zip(rotated.canonicalize().down, canonical.down, strict=True):
        torch.testing.assert_close(down.abs(), expected.abs(), atol=2e-2, rtol=2e-2)


def test_mean_is_the_best_rank_r_of_the_mean_delta() -> None:
    loras = random_lora(3, (4,))
    best = []
    for delta in loras.get_delta_weights():
        u, s, vh = torch.linalg.svd(delta.mean(0))
        best.append(u[:, :2] @ torch.diag(s[:2]) @ vh[:2])
    assert_same_delta(loras.mean(), best, 1e-4)
    lora = random_lora(5)
    assert_same_delta(
        LoraWeights.stack([lora, lora, lora]).mean(), list(lora.get_delta_weights()), 1e-4
    )


def test_zeros_have_zero_delta_and_random_down() -> None:
    zeros = LoraWeights.zeros(LAYOUT, (2,), std=1.0)
    assert zeros.compute_delta_norms().eq(0).all()
    assert all(d.abs().sum() > 0 for d in zeros.down)
    assert LoraWeights.zeros(LAYOUT).flatten().eq(0).all()


def test_init_batch_repeats_one_seeded_start() -> None:
    batch = LoraWeights.init_batch(LAYOUT, 3, seed=7)
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        expected = LoraWeights.zeros(LAYOUT, (), LAYOUT.init_std).flatten()
    assert torch.equal(batch.flatten(), expected.expand(3, -1))


def test_constructors_refuse_wrong_shapes() -> None:
    lora = random_lora(0)
    with pytest.raises(
        LayoutMismatchError, match=f"3 numbers given, the layout has {LAYOUT.numel}"
    ):
        LoraWeights.unflatten(LAYOUT, torch.zeros(3))
    with pytest.raises(LayoutMismatchError, match="2 targets given, the layout has 3"):
        LoraWeights(LAYOUT, lora.down[:2], lora.up[:2])
    with pytest.raises(LayoutMismatchError, match=r"unet\.a: down"):
        LoraWeights(LAYOUT, lora.up, lora.down)
    with pytest.raises(LayoutMismatchError, match="base 'elsewhere'"):
        lora + random_lora(0, layout=LoraLayout(LAYOUT.targets, 2, "elsewhere"))
