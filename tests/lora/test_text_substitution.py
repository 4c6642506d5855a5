"""``TextSubstitution`` against the denoiser with the real prompts."""

import pytest
import torch
from torch import Tensor, nn

from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.text_substitution import TextSubstitution
from hyperlora.lora.weights import LoraWeights
from tests.mock_cuda import mock_cuda

TOKENS, WIDTH = 5, 16


def make_substitution(
    unet: nn.Module, rank: int, empty: Tensor, preset: str = "attention+mlp"
) -> TextSubstitution:
    layout = make_layout({"unet": unet}, preset, rank, "tiny")
    substitution = TextSubstitution(layout, TOKENS, WIDTH)
    layers = dict(unet.named_modules())
    substitution.set_base(empty, [layers[target.path].weight for target in substitution.targets])
    return substitution


def make_zero_loras(substitution: TextSubstitution, *batch: int) -> LoraWeights:
    return LoraWeights.zeros(substitution.other_layout, batch)


@pytest.fixture
def texts() -> tuple[Tensor, Tensor]:
    """The empty prompt [tokens, width], and two prompts that differ from it in two tokens."""
    generator = torch.Generator().manual_seed(3)
    empty = torch.randn(TOKENS, WIDTH, generator=generator)
    prompts = empty.repeat(2, 1, 1)
    prompts[:, 1:3] += torch.randn(2, 2, WIDTH, generator=generator)
    return empty, prompts


@torch.no_grad()
def test_lora_makes_the_empty_prompt_act_as_the_prompt(
    unet: nn.Module, texts: tuple[Tensor, Tensor]
) -> None:
    empty, prompts = texts
    substitution = make_substitution(unet, 2, empty)
    lora = substitution(*substitution.factorize(prompts - empty), make_zero_loras(substitution, 2))
    assert lora.layout == substitution.layout
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([7, 700])
    expected = unet(latents, timesteps, prompts).sample
    with inject_lora(unet, lora):
        model_output = unet(latents, timesteps, empty.expand(2, -1, -1)).sample
    base_output = unet(latents, timesteps, empty.expand(2, -1, -1)).sample
    assert (model_output - expected).abs().max() < 1e-3 * (base_output - expected).abs().max()


def test_factorize_is_exact_up_to_the_rank(unet: nn.Module, texts: tuple[Tensor, Tensor]) -> None:
    empty, prompts = texts
    errors = []
    for rank in (1, 2, 9):  # the last is more than there are tokens
        a, b = make_substitution(unet, rank, empty).factorize(prompts - empty)
        assert a.shape == (2, TOKENS, rank) and b.shape == (2, rank, WIDTH)
        errors.append((a @ b - (prompts - empty)).square().sum((1, 2)))
    squared_norm = (prompts - empty).square().sum((1, 2))
    assert all((error < 1e-6 * squared_norm).all() for error in errors[1:])
    assert (errors[1] < errors[0]).all() and (errors[0] < squared_norm).all()


def test_forward_keeps_other_loras(unet: nn.Module, texts: tuple[Tensor, Tensor]) -> None:
    substitution = make_substitution(unet, 2, texts[0])
    other_layout = substitution.other_layout
    generator = torch.Generator().manual_seed(1)
    other_loras = LoraWeights.unflatten(
        other_layout, torch.randn(3, other_layout.numel, generator=generator)
    )
    lora = substitution(torch.zeros(3, TOKENS, 2), torch.zeros(3, 2, WIDTH), other_loras)
    num_targets = len(lora.layout.targets)
    assert len(substitution.targets) + len(other_layout.targets) == num_targets
    indices = [i for i in range(num_targets) if i not in substitution.target_indices]
    assert all(torch.equal(lora.up[i], up) for i, up in zip(indices, other_loras.up, strict=True))
    assert all(lora.up[i].abs().max() == 0 for i in substitution.target_indices)


def test_forward_accepts_offsets_in_a_basis(unet: nn.Module, texts: tuple[Tensor, Tensor]) -> None:
    empty, _ = texts
    full = make_substitution(unet, 3, empty)
    layers, basis = dict(unet.named_modules()), torch.linalg.qr(torch.randn(WIDTH, 4)).Q.mT
    narrow = TextSubstitution(full.layout, TOKENS, WIDTH, basis_size=4)
    narrow.set_base(empty, [layers[target.path].weight for target in narrow.targets], basis)
    a, b = torch.randn(2, TOKENS, 3), torch.randn(2, 3, 4)
    for delta, expected in zip(
        narrow(a, b, make_zero_loras(narrow, 2)).get_delta_weights(),
        full(a, b @ basis, make_zero_loras(full, 2)).get_delta_weights(),
        strict=True,
    ):
        torch.testing.assert_close(delta, expected, atol=1e-4, rtol=1e-4)


def test_init_refuses_a_layout_without_text_projections() -> None:
    layout = LoraLayout((TargetModule("unet.conv", 16, 8),), 2, "tiny")
    with pytest.raises(
        InvalidArgumentError, match="no target of the layout is a text projection of width 16"
    ):
        TextSubstitution(layout, TOKENS, WIDTH)


def test_forward_pads_other_loras_of_lower_rank(
    unet: nn.Module, texts: tuple[Tensor, Tensor]
) -> None:
    layout = make_layout({"unet": unet}, "attention+mlp", 3, "tiny")
    substitution = TextSubstitution(layout, TOKENS, WIDTH, other_rank=2)
    other_layout = substitution.other_layout
    assert other_layout.rank == 2
    other_loras = LoraWeights.unflatten(other_layout, torch.randn(4, other_layout.numel))
    lora = substitution(torch.zeros(4, TOKENS, 3), torch.zeros(4, 3, WIDTH), other_loras)
    assert lora.layout == layout
    other_deltas = [
        delta
        for i, delta in enumerate(lora.get_delta_weights())
        if i not in substitution.target_indices
    ]
    torch.testing.assert_close(other_deltas, list(other_loras.get_delta_weights()))
    with pytest.raises(InvalidArgumentError, match="cannot be of rank 4: the whole LoRA is of 3"):
        TextSubstitution(layout, TOKENS, WIDTH, other_rank=4)


LAYOUT = LoraLayout(
    (
        TargetModule("unet.a", 9, 4),
        TargetModule("unet.0.attn2.to_k", WIDTH, 7),
        TargetModule("unet.1.attn2.to_k", WIDTH + 1, 7),
        TargetModule("unet.1.attn2.to_v", WIDTH, 3),
        TargetModule("unet.1.attn1.to_v", WIDTH, 6),
    ),
    4,
    "tiny",
)


def test_targets_are_text_projections_of_the_width() -> None:
    substitution = TextSubstitution(LAYOUT, TOKENS, WIDTH)
    assert substitution.target_indices == [1, 3]
    assert substitution.targets == [LAYOUT.targets[1], LAYOUT.targets[3]]
    assert substitution.other_layout == LoraLayout(
        (LAYOUT.targets[0], LAYOUT.targets[2], LAYOUT.targets[4]), 4, "tiny"
    )
    buffers = substitution.state_dict()
    assert {name: tuple(t.shape) for name, t in buffers.items()} == {
        "empty_text_pinv": (TOKENS, WIDTH),
        "weight0": (7, WIDTH),
        "weight1": (3, WIDTH),
    }
    assert not any(t.any() for t in buffers.values())
    narrow = TextSubstitution(LAYOUT, TOKENS, WIDTH, other_rank=4, basis_size=6)
    assert narrow.weight1.shape == (3, 6) and narrow.other_rank == 4
    assert (narrow.num_tokens, narrow.cross_attention_dim, narrow.layout) == (TOKENS, WIDTH, LAYOUT)


def test_forward_equals_its_formula(texts: tuple[Tensor, Tensor]) -> None:
    """ΔW = (W bᵀ) (aᵀ e(∅)⁺ᵀ) at the text projections; also under autocast and from float16."""
    empty, _ = texts
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(size, WIDTH, generator=generator) for size in (7, 3)]
    substitution = TextSubstitution(LAYOUT, TOKENS, WIDTH, other_rank=2)
    substitution.set_base(empty.half(), [weight.double() for weight in weights])
    pinv = torch.linalg.pinv(empty.half().double()).mT.float()
    torch.testing.assert_close(substitution.empty_text_pinv, pinv, atol=1e-5, rtol=1e-4)
    a = torch.randn(2, 3, TOKENS, 4, generator=generator).half()
    b = torch.randn(2, 3, 4, WIDTH, generator=generator).half()
    other_layout = substitution.other_layout
    others = LoraWeights.unflatten(
        other_layout, torch.randn(2, 3, other_layout.numel, generator=generator)
    )
    with torch.autocast("cpu", torch.bfloat16):
        lora = substitution(a, b, others)
    for index, weight in ((1, weights[0]), (3, weights[1])):
        torch.testing.assert_close(lora.up[index], weight @ b.float().mT)
        torch.testing.assert_close(lora.down[index], a.float().mT @ pinv, atol=1e-4, rtol=1e-4)
    for index, delta in zip((0, 2, 4), others.get_delta_weights(), strict=True):
        torch.testing.assert_close(lora.up[index] @ lora.down[index], delta)


def test_small_singular_values_of_the_empty_prompt_are_dropped() -> None:
    """Those below 3e-5 of the largest."""
    empty = torch.zeros(TOKENS, WIDTH)
    empty[range(TOKENS), range(TOKENS)] = torch.tensor([2.0, 1.0, 7e-5, 5e-5, 0.0])
    substitution = TextSubstitution(LAYOUT, TOKENS, WIDTH)
    substitution.set_base(empty, [torch.zeros(7, WIDTH), torch.zeros(3, WIDTH)])
    diagonal = substitution.empty_text_pinv.diagonal()
    torch.testing.assert_close(diagonal, torch.tensor([0.5, 1, 1 / 7e-5, 0, 0]))


def test_substitution_runs_on_the_device_of_the_base(texts: tuple[Tensor, Tensor]) -> None:
    empty, _ = texts
    weights = [torch.randn(7, WIDTH), torch.randn(3, WIDTH)]
    basis = torch.linalg.qr(torch.randn(WIDTH, 6)).Q.mT
    a, b = torch.randn(2, TOKENS, 4), torch.randn(2, 4, 6)

    def run(device: str) -> Tensor:
        substitution = TextSubstitution(LAYOUT, TOKENS, WIDTH, basis_size=6).to(device)
        moved = [weight.to(device) for weight in weights]
        substitution.set_base(empty.to(device), moved, basis.to(device))
        others = make_zero_loras(substitution, 2).to(device)
        lora = substitution(a.to(device), b.to(device), others)
        assert lora.device.type == device
        return lora.flatten().cpu()

    expected = run("cpu")
    with mock_cuda():
        torch.testing.assert_close(run("cuda"), expected)
