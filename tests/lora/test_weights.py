"""The algebra of LoRAs, against explicit ΔW and torch's own SVD."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights
from tests.mock_cuda import mock_cuda

Shape = tuple[int, ...]

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


def test_zeros_and_init_batch_have_their_standard_deviations() -> None:
    layout = LoraLayout((TargetModule("unet.a", 100, 9), TargetModule("unet.b", 300, 9)), 30, "b")
    generator = torch.Generator().manual_seed(3)
    zeros = LoraWeights.zeros(layout, (2, 3), 0.5, generator)
    assert zeros.batch_shape == (2, 3)
    flat = torch.cat([down.flatten() for down in zeros.down])
    assert float(flat.std()) == pytest.approx(0.5, rel=0.02)
    again = LoraWeights.zeros(layout, (2, 3), 0.5, torch.Generator().manual_seed(3))
    assert torch.equal(zeros.flatten(), again.flatten())
    batch = LoraWeights.init_batch(layout, 4, 1, "cpu")
    down = torch.cat([down.flatten() for down in batch.down])
    assert float(down.std()) == pytest.approx(200**-0.5, rel=0.05)  # of the mean of in_features
    assert batch.down[0].stride()[0] == 0 and batch.up[1].shape == (4, 9, 30)
    assert not torch.equal(batch.flatten(), LoraWeights.init_batch(layout, 4, 2).flatten())


def test_mean_squared_norm_is_that_of_all_deltas() -> None:
    """Mean of ‖ΔW‖² over batch and targets; its gradient exists at ΔW = 0."""
    lora = random_lora(1, (2, 3))
    expected = sum(d.square().sum() for d in lora.get_delta_weights()) / (2 * 3 * 3)
    torch.testing.assert_close(lora.compute_mean_squared_norm(), expected)
    zeros = LoraWeights.zeros(LAYOUT, (2,), 1.0).apply(lambda t: t.requires_grad_())
    zeros.compute_mean_squared_norm().backward()
    assert all(up.grad is not None and up.grad.isfinite().all() for up in zeros.up)


def test_norms_of_differences_of_equal_loras_are_no_nan() -> None:
    lora = random_lora(2, (5,))
    norms = (lora - lora).compute_delta_norms()
    assert norms.isfinite().all() and norms.max() < 1e-2
    assert norms.shape == (5, 3)


def test_batches_are_indexed_and_rotated() -> None:
    batch, single = random_lora(3, (4, 2)), random_lora(3)
    flat = batch.flatten()
    for index in (0, -4, 3, slice(1, 3), [2, 0], torch.tensor([3, 3, 1])):
        assert torch.equal(batch[index].flatten(), flat[index])
    for index in (4, -5):
        with pytest.raises(IndexError):
            batch[index]
    assert torch.equal(batch.shuffle_batch().flatten(), flat[[3, 0, 1, 2]])
    assert len(batch) == 4 and batch.batch_shape == (4, 2) and single.batch_shape == ()
    with pytest.raises(TypeError, match="no batch axis"):
        len(single)
    assert bool(batch[:0]) and bool(single) and len(batch[:0]) == 0


def test_strengths_scale_one_lora_of_a_batch_each() -> None:
    lora = random_lora(4, (2, 3))
    strengths = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
    for scaled in (lora * strengths, strengths[0, 1] * lora, lora * torch.tensor(2.0), 2 * lora):
        assert all(map(torch.equal, scaled.down, lora.down))
    scaled = lora * strengths
    for i, up in enumerate(lora.up):
        assert torch.equal(scaled.up[i], up * strengths[:, :, None, None])
        assert torch.equal((lora * torch.tensor(2.0)).up[i], 2 * up)
        assert torch.equal((-lora).up[i], -up)
    difference = lora - random_lora(5, (2, 3))
    assert difference.layout.rank == 4 and torch.equal(difference.down[0][..., :2, :], lora.down[0])


def test_to_and_detach_change_every_tensor() -> None:
    lora = random_lora(6, (2,)).apply(lambda t: t.requires_grad_())
    half = lora.to("cpu", torch.float16)
    assert {t.dtype for t in (*half.down, *half.up)} == {torch.float16}
    assert {t.dtype for t in (*lora.to("cpu").down, *lora.to("cpu").up)} == {torch.float32}
    assert not any(t.requires_grad for t in (*lora.detach().down, *lora.detach().up))
    assert lora.device == torch.device("cpu")
    with mock_cuda(), torch.no_grad():
        card = lora.to("cuda")
        assert card.device.type == "cuda" and all(t.is_cuda for t in (*card.down, *card.up))
        rotated = card.shuffle_batch()
        assert torch.equal(rotated.flatten().cpu(), lora.flatten()[[1, 0]])
        batch = LoraWeights.init_batch(LAYOUT, 2, 7, "cuda")
        assert torch.equal(batch.flatten().cpu(), LoraWeights.init_batch(LAYOUT, 2, 7).flatten())


@pytest.mark.parametrize(
    ("down_shapes", "up_shapes"),
    [
        ([(2, 7), (2, 18), (2, 3)], [(5, 2), (6, 2)]),
        ([(2, 7), (2, 18)], [(5, 2), (6, 2), (9, 2)]),
        ([(2, 7), (2, 18), (2, 3)], [(5, 2), (6, 2), (9, 1)]),
        ([(2, 7), (2, 18), (2, 4)], [(5, 2), (6, 2), (9, 2)]),
        ([(4, 2, 7), (4, 2, 18), (4, 2, 3)], [(4, 5, 2), (4, 6, 2), (3, 9, 2)]),
        ([(4, 2, 7), (4, 2, 18), (4, 2, 3)], [(4, 5, 2), (4, 6, 2), (9, 2)]),
    ],
)
def test_shapes_must_fit_the_layout(down_shapes: list[Shape], up_shapes: list[Shape]) -> None:
    down, up = (tuple(map(torch.zeros, shapes)) for shapes in (down_shapes, up_shapes))
    with pytest.raises(LayoutMismatchError):
        LoraWeights(LAYOUT, down, up)


def test_stack_takes_loras_of_one_layout() -> None:
    loras = [random_lora(i, (2,)) for i in range(3)]
    stacked = LoraWeights.stack(loras)
    assert torch.equal(stacked.flatten(), torch.stack([lora.flatten() for lora in loras]))
    for layout in (LAYOUT.with_rank(3), LoraLayout(LAYOUT.targets, 2, "elsewhere")):
        with pytest.raises(LayoutMismatchError, match=r"rank 3|elsewhere"):
            LoraWeights.stack([loras[0], LoraWeights.zeros(layout, (2,)), loras[1]])


def test_resize_takes_ranks_from_1_to_that_of_the_widest_target() -> None:
    lora = random_lora(0)
    assert lora.resize(6).layout.rank == 6
    for rank in (0, 7):
        with pytest.raises(InvalidArgumentError, match="rank"):
            lora.resize(rank)
    # a sum of LoRAs may have more ranks than its targets, and keeps them
    wide = lora + lora + lora + lora
    assert wide.resize(8).layout.rank == 8 and wide.resize(7).layout.rank == 7
    assert_same_delta(wide.resize(7), list(wide.get_delta_weights()), 1e-4)


def test_mean_weights_all_loras_equally() -> None:
    """ΔW of rank 1 each, whose mean has rank 3: at rank 6 it is exact."""
    loras = random_lora(7, (3,), LAYOUT.with_rank(1))
    padded = LoraWeights.unflatten(
        LAYOUT.with_rank(6), torch.stack([lora.resize(6).flatten() for lora in loras])
    )
    means = [delta.sum(0) / 3 for delta in loras.get_delta_weights()]
    assert padded.mean().layout.rank == 6
    assert_same_delta(padded.mean(), means, 1e-4)
