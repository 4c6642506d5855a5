"""Parts of LoRAs at their modules, and LoRAs in the precision and on the device of an input."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hyperlora.diffusion.lora_injection import (
    inject_lora,
    move_lora,
    pause_compilation,
    split_denoiser,
    split_text_encoders,
)
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.lora.layout import LoraLayout, TargetModule, make_target
from hyperlora.lora.weights import LoraWeights
from tests.mock_cuda import CUDA, mock_cuda


class Weights(nn.Module):
    """A module with one parameter of each dtype, in their order."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.values = nn.ParameterList(
            nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False) for dtype in dtypes
        )


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.float32), torch.bfloat16),
        ((torch.float8_e4m3fn, torch.float16), torch.float16),  # cast layer by layer
        ((torch.int32, torch.float8_e4m3fn), torch.float32),
        ((), torch.float32),
    ],
)
def test_move_lora_takes_the_precision_in_which_a_module_computes(
    dtypes: tuple[torch.dtype, ...], expected: torch.dtype
) -> None:
    layout = LoraLayout((TargetModule("unet.a", 3, 4),), 2, "tiny")
    lora = LoraWeights.unflatten(layout, torch.randn(layout.numel).double())
    for device in ("cpu", "meta"):
        moved = move_lora(lora, torch.device(device), Weights(*dtypes))
        assert {factor.dtype for factor in (*moved.down, *moved.up)} == {expected}
        assert moved.device.type == device


def make_part_loras() -> tuple[LoraWeights, LoraWeights, LoraWeights]:
    """A LoRA of a UNet and two text encoders, one of the UNet and one of the text encoders."""
    names = ("unet.a", "text_encoder.b", "text_encoder_2.c")
    targets = tuple(TargetModule(name, 3, 4) for name in names)
    whole, denoiser_lora, text_lora = (
        LoraWeights.unflatten(layout, torch.ones(layout.numel))
        for layout in (LoraLayout(part, 2, "tiny") for part in (targets, targets[:1], targets[1:]))
    )
    return whole, denoiser_lora, text_lora


def test_denoisers_parts_are_moved_to_it() -> None:
    whole, denoiser_lora, text_lora = make_part_loras()
    meta = torch.device("meta")
    family: Any = SimpleNamespace(
        denoiser_name="unet", device=meta, denoiser=Weights(torch.bfloat16)
    )
    parts = split_denoiser(family, [text_lora, whole, denoiser_lora])
    assert [part.layout.components for part in parts] == [("unet",)] * 3
    assert {(part.device, part.up[0].dtype) for part in parts} == {(meta, torch.bfloat16)}
    assert split_denoiser(family, [text_lora, text_lora]) == []
    family.device = torch.device("cpu")
    zeros, part, other = split_denoiser(family, [text_lora, whole, denoiser_lora])
    assert not zeros.get_delta_weights()[0].any()
    assert part.get_delta_weights()[0].all() and other.get_delta_weights()[0].all()


def test_text_encoders_parts_are_moved_to_them() -> None:
    whole, denoiser_lora, _ = make_part_loras()
    meta = torch.device("meta")
    pipe: Any = SimpleNamespace(
        _execution_device=meta,
        text_encoder=Weights(torch.float16),
        text_encoder_2=Weights(torch.float32),
    )
    (first, first_lora), (second, second_lora) = split_text_encoders(pipe, whole, "unet")
    assert (first, second) == (pipe.text_encoder, pipe.text_encoder_2)
    assert first_lora.layout.components == ("text_encoder",)
    assert second_lora.layout.components == ("text_encoder_2",)
    assert first_lora.device == second_lora.device == meta
    assert (first_lora.up[0].dtype, second_lora.up[0].dtype) == (torch.float16, torch.float32)
    assert list(split_text_encoders(pipe, denoiser_lora, "unet")) == []
    pipe.text_encoder_2 = None
    with pytest.raises(LayoutMismatchError, match="text_encoder_2, which SimpleNamespace lacks"):
        list(split_text_encoders(pipe, whole, "unet"))


def make_layer_lora(
    layer: nn.Module, *batch: int, name: str = "unet.layer"
) -> tuple[nn.Module, LoraWeights]:
    """A module that holds the layer, and a random LoRA in float32 of it."""
    *parents, last = name.split(".")[1:]
    module = inner = nn.Module()
    for parent in parents:
        inner.add_module(parent, nn.Module())
        inner = inner.get_submodule(parent)
    inner.add_module(last, layer)
    layout = LoraLayout((make_target(name, layer),), 2, "tiny")
    generator = torch.Generator().manual_seed(0)
    flat = 0.3 * torch.randn(*batch, layout.numel, generator=generator)
    return module, LoraWeights.unflatten(layout, flat)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (4, 5, 6)),
    "convolution": (lambda: nn.Conv2d(2, 4, 3, padding=1), (4, 2, 5, 6)),
}


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("kind", LAYERS)
def test_loras_are_applied_in_the_precision_of_their_input(
    kind: str, batch: tuple[int, ...]
) -> None:
    make_layer, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make_layer()
    module, lora = make_layer_lora(layer, *batch)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), inject_lora(module, lora):
        expected = layer(x)
    layer.bfloat16().requires_grad_(False)
    flat = lora.flatten().requires_grad_()
    with inject_lora(module, LoraWeights.unflatten(lora.layout, flat)):
        output = layer(x.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.03, rtol=0.03)
    output.float().sum().backward()
    assert flat.grad is not None and flat.grad.dtype == torch.float32 and flat.grad.any()


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("kind", LAYERS)
def test_loras_of_the_cpu_meet_an_input_on_a_card(kind: str, batch: tuple[int, ...]) -> None:
    make_layer, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make_layer().requires_grad_(False)
    module, lora = make_layer_lora(layer, *batch)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), inject_lora(module, lora):
        expected = layer(x)
    with mock_cuda(), torch.no_grad(), inject_lora(module.to(CUDA), lora):
        output = layer(x.to(CUDA))
        assert output.device == CUDA
        torch.testing.assert_close(output.cpu(), expected)


@pytest.mark.parametrize("batch", [(), (1,)])
def test_text_projections_keep_their_precision_under_autocast(batch: tuple[int, ...]) -> None:
    """The LoRA is the difference of two features, 257 - 256, which are equal in bfloat16."""
    x, differences = torch.tensor([[[256.0, 257.0]]]), []
    for name in ("unet.block.attn2.to_k", "unet.block.attn2.to_q"):
        layer = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(layer.weight)
        module, lora = make_layer_lora(layer, *batch, name=name)
        flat = torch.tensor([-1.0, 1.0, 0.0, 0.0, 1.0, 0.0]).expand(*batch, 6)  # down, then up
        with (
            torch.no_grad(),
            inject_lora(module, LoraWeights.unflatten(lora.layout, flat)),
            torch.autocast("cpu", torch.bfloat16),
        ):
            output = layer(x)
        assert output.dtype == torch.bfloat16, "as without a LoRA"
        differences.append(output.item())
    assert differences == [1.0, 0.0]


class Attention(nn.Module):
    """The name and the projections of diffusers' attention, single and perhaps fused."""

    def __init__(self, *, is_fused: bool | None = None, processor: object = None) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(3, 3) for _ in range(3))
        if is_fused is not None:
            self.to_qkv = nn.Linear(3, 9)
            self.fused_projections = is_fused
        if processor is not None:
            self.processor = processor


class NewAttention(Attention):
    """An attention whose projections are fused without a processor of another class."""


class FusedAttnProcessor:
    """The name of a processor that runs the fused projections."""


def inject_into(*attentions: Attention) -> None:
    module = nn.ModuleList(attentions)
    targets = [
        make_target(f"unet.{i}.{name}", layer)
        for i, attention in enumerate(attentions)
        for name, layer in attention.named_children()
        if name in ("to_q", "to_k", "to_v")
    ]
    layout = LoraLayout(tuple(targets), 2, "tiny")
    with inject_lora(module, LoraWeights.unflatten(layout, torch.zeros(layout.numel))):
        pass


def test_projections_that_never_run_are_refused() -> None:
    plain, unfused = Attention(), Attention(is_fused=True, processor=object())
    with_part = NewAttention()
    with_part.to_qkv = nn.Linear(3, 9)  # of another library, which does not tell
    inject_into(plain, unfused, Attention(is_fused=False), NewAttention(is_fused=False), with_part)
    of_processor = Attention(is_fused=True, processor=FusedAttnProcessor())
    for fused in (NewAttention(is_fused=True), of_processor):
        with pytest.raises(InvalidArgumentError, match=r"unet\.2\.to_q is fused with others"):
            inject_into(plain, unfused, fused)


def test_a_component_that_is_not_there_is_refused() -> None:
    module, lora = make_layer_lora(nn.Linear(3, 4), name="text_encoder.layer")
    with pytest.raises(LayoutMismatchError, match=r"text_encoder\.layer"):
        inject_lora({"unet": module}, lora).__enter__()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_compiled_modules_run_eagerly_with_their_lora(is_compiled: bool) -> None:
    """Where nothing of the base is compiled, what a user compiled beside it stays compiled."""
    graphs: list[str] = []

    def record_graph(graph: Any, inputs: Any) -> Any:
        graphs.append("graph")
        return graph.forward

    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3)
    layout = LoraLayout((make_target("unet.0", module[0]),), 2, "tiny")
    lora = LoraWeights.unflatten(layout, torch.randn(layout.numel))
    with torch.no_grad(), inject_lora(module, lora):
        expected = module(x)
    if is_compiled:
        module.compile(backend=record_graph)
    other = torch.compile(lambda values: values * 2, backend=record_graph)
    with torch.no_grad(), inject_lora(module, lora):
        assert torch.equal(other(x), x * 2)
        torch.testing.assert_close(module(x), expected)
    assert graphs == ([] if is_compiled else ["graph"])


@pytest.mark.parametrize("form", [None, "in place", "wrapped", "forward"])
def test_each_form_of_a_compiled_part_pauses_compilation(
    form: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the marks that torch.compile leaves, which each form has of its own."""
    stances: list[str] = []
    monkeypatch.setattr(
        torch.compiler, "set_stance", lambda stance: nullcontext(stances.append(stance))
    )
    module = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 3)))
    layer = module[1][0]
    match form:
        case "in place":
            layer._compiled_call_impl = layer.forward
        case "wrapped":
            module[1].add_module("_orig_mod", layer)
        case "forward":
            forward = partial(layer.forward)
            forward._torchdynamo_orig_callable = layer.forward
            layer.forward = forward
    with pause_compilation(module):
        pass
    assert stances == ([] if form is None else ["force_eager"])
