"""Heads: each equals the formula of its paper, and starts as it says."""

import pytest
import torch
from torch import Tensor

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.heads import DirectHead, LiDB, LowRankBasisHead, SoftmaxBasisHead, make_head
from hyperlora.lora.layout import LoraLayout, TargetModule
from tests.mock_cuda import mock_cuda

LAYOUT = LoraLayout(
    (
        TargetModule("unet.a", 11, 13),
        TargetModule("unet.b", 4, 5),
        TargetModule("unet.c", 9 * 2, 3, (3, 3)),
        TargetModule("unet.d", 18, 13),
    ),
    rank=2,
    base="tiny",
)


def make_codes(head: torch.nn.Module, *batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, *batch, 4, head.code_size, generator=generator)
    return down, up


def test_lidb_equals_its_formula() -> None:
    """up = A_aux A_train, down = B_train B_aux; smaller targets cut their matrices and codes."""
    head = LiDB(LAYOUT, a=7, b=6, seed=5)
    assert head.code_size == 14
    down, up = make_codes(head, 2, 3)
    weights = head(down, up)
    for i, (a, b) in enumerate(((7, 6), (5, 4), (3, 6), (7, 6))):
        target = LAYOUT.targets[i]
        a_aux, b_aux = head.get_buffer(f"a{i}"), head.get_buffer(f"b{i}")
        assert a_aux.shape == (target.out_features, a) and b_aux.shape == (b, target.in_features)
        torch.testing.assert_close(a_aux.T @ a_aux, torch.eye(a), atol=1e-5, rtol=0)
        torch.testing.assert_close(b_aux @ b_aux.T, torch.eye(b), atol=1e-5, rtol=0)
        expected_down = down[..., i, : 2 * b].reshape(2, 3, 2, b) @ b_aux
        expected_up = a_aux @ up[..., i, : 2 * a].reshape(2, 3, a, 2)
        torch.testing.assert_close(weights.down[i], expected_down)
        torch.testing.assert_close(weights.up[i], expected_up)
    assert LiDB(LAYOUT, a=3, b=8).code_size == 16
    assert weights.layout is LAYOUT and not head.state_dict()


def test_lidb_draws_from_two_streams_of_its_seed() -> None:
    """Auxiliary matrices, target by target, from the seed; codes of b^-1/2 from the next one."""
    head = LiDB(LAYOUT, a=7, b=6, seed=5)
    generator = torch.Generator().manual_seed(5)
    for i, target in enumerate(LAYOUT.targets):
        for name, size, columns in (("a", target.out_features, 7), ("b", target.in_features, 6)):
            columns = min(size, columns)
            matrix = torch.linalg.qr(torch.randn(size, columns, generator=generator)).Q
            assert torch.equal(head.get_buffer(f"{name}{i}"), matrix if name == "a" else matrix.T)
    codes = head.init_codes()
    down = torch.randn(4, 14, generator=torch.Generator().manual_seed(6)) / 6**0.5
    torch.testing.assert_close(codes, torch.cat([down, torch.zeros(4, 14)]))
    default = LiDB(LAYOUT)
    assert (default.a, default.b, default.seed, default.code_size) == (100, 50, 0, 200)
    assert torch.equal(default.a0, LiDB(LAYOUT, 100, 50, 0).a0)
    with pytest.raises(InvalidArgumentError, match="seed from 0"):
        LiDB(LAYOUT, seed=-1)


@pytest.mark.parametrize("share_by_shape", [False, True])
@pytest.mark.parametrize("coefficients_per_rank", [False, True])
def test_basis_equals_its_formula(coefficients_per_rank: bool, share_by_shape: bool) -> None:
    """D_0 + Σ_i c_i D_i and Σ_i c'_i U_i, one coefficient per direction or vector of it."""
    torch.manual_seed(0)
    head = LowRankBasisHead(LAYOUT, 3, coefficients_per_rank, share_by_shape)
    assert head.code_size == (6 if coefficients_per_rank else 3)
    down_codes, up_codes = make_codes(head, 2, 3)
    weights = head(down_codes, up_codes)
    # unet.c has as many inputs as unet.d, but is a convolution
    down_groups = (0, 1, 2, 3)
    up_groups = (0, 1, 2, 0) if share_by_shape else (0, 1, 2, 3)
    for i, target in enumerate(LAYOUT.targets):
        down = head.down_bias[i].expand(2, 3, -1, -1).clone()
        up = torch.zeros(2, 3, target.out_features, 2)
        for k in range(3):
            for r in range(2):
                code = 2 * k + r if coefficients_per_rank else k
                direction = head.down_basis[down_groups[i]][k].view(2, target.in_features)
                down[..., r, :] += down_codes[..., i, code, None] * direction[r]
                direction = head.up_basis[up_groups[i]][k].view(target.out_features, 2)
                up[..., r] += up_codes[..., i, code, None] * direction[:, r]
        torch.testing.assert_close(weights.down[i], down)
        torch.testing.assert_close(weights.up[i], up)
    assert len(head.up_basis) == len(set(up_groups)) and len(head.down_basis) == 4
    assert head.share_by_shape is share_by_shape


def test_basis_groups_equal_inputs_of_equal_kernels() -> None:
    targets = [TargetModule(f"unet.{i}", 18, i + 1, k) for i, k in enumerate((None, (3, 3)) * 2)]
    head = LowRankBasisHead(LoraLayout((*targets, TargetModule("unet.e", 4, 9)), 1, "tiny"), 3)
    assert head.down_groups == head.up_groups == [0, 1, 2, 3, 4]
    layout = LoraLayout((TargetModule("unet.e", 4, 9), *targets), 1, "tiny")
    shared = LowRankBasisHead(layout, 3, share_by_shape=True)
    assert shared.down_groups == [0, 1, 2, 1, 2] and shared.up_groups == [0, 1, 2, 3, 4]
    assert [basis.shape[1] for basis in shared.down_basis] == [4, 18, 18]
    assert [basis.shape[1] for basis in shared.up_basis] == [9, 1, 2, 3, 4]


def test_basis_keeps_variances() -> None:
    """D_0 and D_i have in^-1/2, U_i (s r)^-1/2; codes of down start at a tenth of s^-1/2."""
    torch.manual_seed(0)
    layout = LoraLayout((TargetModule("unet.a", 49, 64), TargetModule("unet.b", 100, 36)), 4, "t")
    head = LowRankBasisHead(layout, 25)
    stds = [float(p.detach().std()) for p in head.parameters()]
    names = [name for name, _ in head.named_parameters()]
    expected = {"down_bias": (1 / 7, 1 / 10), "down_basis": (1 / 7, 1 / 10), "up_basis": (0.1, 0.1)}
    for name, std in zip(names, stds, strict=True):
        kind, index = name.split(".")
        assert std == pytest.approx(
            expected[kind][int(index)], rel=0.15 if "bias" in name else 0.05
        )
    large = LowRankBasisHead(LoraLayout(LAYOUT.targets[1:2], 2, "tiny"), 10_000)
    codes = large.init_codes()
    assert codes.shape == (2, 10_000) and not codes[1:].any()
    assert float(codes[0].std()) == pytest.approx(0.001, rel=0.05)
    default = LowRankBasisHead(LAYOUT)
    assert default.size == default.code_size == 48
    assert (default.coefficients_per_rank, default.share_by_shape) == (False, False)


def test_softmax_mixes_loras_by_weights_that_add_up_to_1() -> None:
    """D_0 + Σ_i softmax(c)_i D_i; all U_i are 0 at first, and all weights equal."""
    head = SoftmaxBasisHead(LAYOUT)
    assert head.size == 32 and not any(basis.any() for basis in head.up_basis)
    head = SoftmaxBasisHead(LAYOUT, 3)
    assert torch.equal(head.init_codes(), torch.zeros(8, 3))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    down, up = make_codes(head, 2)
    weights = head(down, up)
    exponents = (down.exp(), up.exp())
    shares = [e / e.sum(-1, keepdim=True) for e in exponents]
    expected = LowRankBasisHead.forward(head, *shares)
    torch.testing.assert_close(weights.flatten(), expected.flatten())


def test_direct_codes_are_the_factors() -> None:
    head = DirectHead(LAYOUT)
    assert head.code_size == 36  # rank 2 of 18 inputs
    assert DirectHead(LoraLayout(LAYOUT.targets[:2], 3, "tiny")).code_size == 39
    down, up = make_codes(head, 5, 3)
    weights = head(down, up)
    for i, target in enumerate(LAYOUT.targets):
        size = 2 * target.in_features
        assert torch.equal(weights.down[i].flatten(2), down[:, :, i, :size])
        assert torch.equal(weights.up[i].flatten(2), up[:, :, i, : 2 * target.out_features])
    torch.manual_seed(0)
    wide = DirectHead(
        LoraLayout((TargetModule("unet.a", 9, 9), TargetModule("unet.b", 400, 9)), 8, "")
    )
    codes = wide.init_codes()
    assert codes.shape == (4, 3200) and not codes[2:].any()
    assert [float(code.std()) for code in codes[:2]] == pytest.approx([1 / 3, 1 / 20], rel=0.1)


def test_make_head_passes_options() -> None:
    heads = [make_head(name, LAYOUT) for name in ("lidb", "basis", "softmax", "direct")]
    assert [type(head) for head in heads] == [LiDB, LowRankBasisHead, SoftmaxBasisHead, DirectHead]
    assert make_head("basis", LAYOUT, size=7, coefficients_per_rank=True).code_size == 14
    with pytest.raises(InvalidArgumentError, match=r"'lora'; known: lidb, basis, softmax, direct"):
        make_head("lora", LAYOUT)


@pytest.mark.parametrize("name", ["lidb", "basis", "softmax", "direct"])
def test_heads_run_on_the_device_of_their_codes(name: str) -> None:
    head = make_head(name, LAYOUT)
    down, up = make_codes(head, 2)
    expected = head(down, up).flatten().detach()
    with mock_cuda(), torch.no_grad():
        flat = head.to("cuda")(down.to("cuda"), up.to("cuda")).flatten()
        assert flat.is_cuda
        torch.testing.assert_close(flat.cpu(), expected)
