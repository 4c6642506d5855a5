"""Pipelines in use: with a LoRA of diffusers, compiled, wrapped, fused or stored in 8 bits."""

from collections.abc import Collection
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.lora_injection import inject_lora, move_lora
from hyperlora.diffusion.multi_lora import CompositionConfig, compose_loras
from hyperlora.diffusion.negative_lora import inject_lora_by_branch
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.weights import LoraWeights
from tests.tiny_pipelines import get_tiny_pipeline

NAMES = ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "z_image"]


def make_lora(base: DiffusionBase, seed: int, preset: str) -> LoraWeights:
    layout = base.make_layout(preset, 2)
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights.unflatten(layout, 0.3 * torch.randn(layout.numel, generator=generator))


def sample(name: str, pipe: Any, steps: int = 2) -> Tensor:
    tiny = get_tiny_pipeline(name)
    return pipe(
        prompt=list(tiny.prompts),
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **deepcopy(tiny.arguments),
    ).images


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_lora_is_added_to_one_that_diffusers_loaded(
    name: str, fused: bool, tmp_path: Path
) -> None:
    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline(name).pipe))
    pipe = base.pipeline
    loaded = make_lora(base, 0, "attention")
    other = make_lora(base, 1, "attention+mlp")
    with compose_loras(pipe, [loaded, other]):
        expected = sample(name, pipe)
    path = save_lora(loaded, tmp_path / "loaded.safetensors")
    other_path = save_lora(other, tmp_path / "other.safetensors")

    pipe.load_lora_weights(str(path), adapter_name="loaded")
    if fused:
        pipe.fuse_lora()
    assert base.make_layout("attention+mlp", 2) == other.layout
    reloaded = load_lora(other_path, modules=base.modules).weights
    assert reloaded.layout.targets == other.layout.targets
    with compose_loras(pipe, [other]):
        torch.testing.assert_close(sample(name, pipe), expected, atol=1e-3, rtol=1e-3)
    with apply_autolora_guidance(pipe, other, 1.0):
        torch.testing.assert_close(sample(name, pipe), expected, atol=1e-3, rtol=1e-3)
    assert (sample(name, pipe) - expected).abs().max() > 0.01


def test_convolutions_of_a_loaded_lora_take_another(tmp_path: Path) -> None:
    name = "stable_diffusion"
    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline(name).pipe))
    first, second = (make_lora(base, seed, "attention+conv") for seed in (0, 1))
    with compose_loras(base.pipeline, [first, second], weights=[0.3, 0.3]):
        expected = sample(name, base.pipeline)
    path = save_lora(first * 0.3, tmp_path / "first.safetensors")
    base.pipeline.load_lora_weights(str(path))
    with compose_loras(base.pipeline, [second], weights=[0.3]):
        torch.testing.assert_close(sample(name, base.pipeline), expected, atol=1e-2, rtol=1e-2)


def apply_strategies(base: DiffusionBase, lora: LoraWeights) -> dict[str, Any]:
    """Contexts that all sample with one LoRA on the whole image."""
    pipe = base.pipeline
    config = CompositionConfig(regions=[(0, 0, 1, 1)])
    return {
        "merge": compose_loras(pipe, [lora]),
        "schedule": compose_loras(pipe, [lora], schedule=lambda step, num_steps: [1.0]),
        "switch": compose_loras(pipe, [lora], "switch"),
        "composite": compose_loras(pipe, [lora], "composite"),
        "spatial": compose_loras(pipe, [lora], "spatial", config=config),
        "guidance": apply_autolora_guidance(pipe, lora, 1.0),
        "branches": inject_lora_by_branch(pipe, lora, lora),
        "per sample": base.inject_lora(LoraWeights.stack([lora, lora])),
    }


@pytest.fixture(params=["stable_diffusion", "z_image"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def compile_module(base: DiffusionBase, how: str) -> None:
    component, module = base.family.denoiser_name, base.denoiser
    if how == "wrapped":
        setattr(base.pipeline, component, torch.compile(module, backend="eager"))
    elif how == "in place":
        module.compile(backend="eager")
    elif how == "forward":
        module.forward = torch.compile(module.forward, backend="eager")
    else:  # as ``compile_repeated_blocks`` does
        for block in module.modules():
            if type(block).__name__ in ("FluxTransformerBlock", "FluxSingleTransformerBlock"):
                block.compile(backend="eager")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("stable_diffusion", "wrapped"),
        ("stable_diffusion_3", "in place"),
        ("flux", "blocks"),
        ("flux", "forward"),
    ],
)
def test_compiled_denoisers_take_loras_in_every_strategy(name: str, how: str) -> None:
    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline(name).pipe))
    lora = make_lora(base, 2, "attention+mlp")
    plain = sample(name, base.pipeline, 1)
    with base.inject_lora(lora):
        expected = sample(name, base.pipeline, 1)
    assert (expected - plain).abs().max() > 0.002

    compile_module(base, how)
    # the code that is compiled here knows no LoRA
    torch.testing.assert_close(sample(name, base.pipeline, 1), plain, atol=1e-4, rtol=1e-4)
    assert base.make_layout("attention+mlp", 2) == lora.layout
    assert_all_equal(name, base, lora, expected)
    torch.testing.assert_close(sample(name, base.pipeline, 1), plain, atol=1e-4, rtol=1e-4)


def test_loras_add_up_with_adapters_of_diffusers_in_every_strategy(
    name: str, tmp_path: Path
) -> None:
    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline(name).pipe))
    pipe = base.pipeline
    speed, mine = make_lora(base, 3, "attention"), make_lora(base, 4, "attention")
    for adapter, lora in (("speed", speed), ("mine", mine)):
        path = save_lora(lora, tmp_path / f"{adapter}.safetensors", format="diffusers")
        pipe.load_lora_weights(str(path), adapter_name=adapter)
    pipe.set_adapters(["mine"])
    mine_alone = sample(name, pipe, 1)
    pipe.set_adapters(["speed", "mine"], [0.7, 1.0])
    both = sample(name, pipe, 1)
    assert (both - mine_alone).abs().max() > 0.002

    pipe.delete_adapters(["mine"])
    pipe.set_adapters(["speed"], [0.7])
    assert_all_equal(name, base, mine, both)
    pipe.fuse_lora(adapter_names=["speed"])
    assert_all_equal(name, base, mine, both, ["merge", "composite"])
    pipe.unfuse_lora()
    pipe.delete_adapters(["speed"])  # the wrappers stay
    assert_all_equal(name, base, mine, mine_alone, ["merge", "composite"])
    pipe.unload_lora_weights()
    assert_all_equal(name, base, mine, mine_alone, ["merge", "composite"])


def assert_all_equal(
    name: str,
    base: DiffusionBase,
    lora: LoraWeights,
    expected: Tensor,
    strategies: Collection[str] = (),
) -> None:
    for strategy, context in apply_strategies(base, lora).items():
        if strategies and strategy not in strategies:
            continue
        with context:
            output = sample(name, base.pipeline, 1)
        torch.testing.assert_close(
            output, expected, atol=1e-4, rtol=1e-3, msg=partial("{}: {}".format, strategy)
        )


def test_layers_are_found_inside_a_peft_model(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline(name).pipe))
    lora = make_lora(base, 5, "attention")
    with base.inject_lora(lora):
        expected = sample(name, base.pipeline)
    denoiser = base.denoiser
    wrapped = get_peft_model(denoiser, LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    component = base.family.denoiser_name
    assert make_layout({component: wrapped}, "attention", 2, "tiny/base") == lora.layout
    with inject_lora({component: wrapped}, lora):
        torch.testing.assert_close(sample(name, base.pipeline), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3", "flux"])
def test_fused_projections_are_refused_until_they_are_unfused(name: str) -> None:
    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline(name).pipe))
    lora = make_lora(base, 6, "attention")
    with base.inject_lora(lora):
        expected = sample(name, base.pipeline)
    base.denoiser.fuse_qkv_projections()
    with pytest.raises(InvalidArgumentError, match="is fused with others and never runs"):
        base.inject_lora(lora).__enter__()
    base.denoiser.unfuse_qkv_projections()
    with base.inject_lora(lora):
        torch.testing.assert_close(sample(name, base.pipeline), expected, atol=1e-4, rtol=1e-4)


def test_lora_keeps_its_precision_where_weights_are_stored_in_8_bits() -> None:
    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline("stable_diffusion").pipe))
    lora = make_lora(base, 7, "attention")
    base.denoiser.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    moved = move_lora(lora, base.device, base.denoiser)
    torch.testing.assert_close(moved.flatten(), lora.flatten(), atol=0, rtol=0)


class PackedLinear(nn.Linear):
    """A Linear layer of int8 numbers, packed in one column of bytes as bitsandbytes packs them."""

    row_scales: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.bias = layer.bias
        row_scales = layer.weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
        numbers = (layer.weight.detach() / row_scales).round().to(torch.int8)
        self.register_buffer("row_scales", row_scales)
        self.weight = nn.Parameter(numbers.view(torch.uint8).reshape(-1, 1), requires_grad=False)

    def unpack(self) -> Tensor:
        numbers = self.weight.view(torch.int8).reshape(self.out_features, self.in_features)
        return numbers.float() * self.row_scales

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpack(), self.bias)


class PackedModule(nn.Module):
    """The same as a plain module with other names of its weights, as Nunchaku's layers are."""

    row_scales: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed = PackedLinear(layer)
        self.qweight, self.bias, self.row_scales = packed.weight, packed.bias, packed.row_scales

    def unpack(self) -> Tensor:
        numbers = self.qweight.view(torch.int8).reshape(self.out_features, self.in_features)
        return numbers.float() * self.row_scales

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpack(), self.bias)


PACKED_CLASSES = [PackedLinear, PackedModule]


def pack_linears(module: nn.Module, packed_class: Any, lora: LoraWeights) -> None:
    """Replace Linear layers, as the quantizers of diffusers do: all of them, or targets alone."""
    target_paths = {target.path for target in lora.layout.targets}
    for path, layer in list(module.named_modules()):
        if type(layer) is nn.Linear and (packed_class is PackedLinear or path in target_paths):
            parent_path, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent_path), name, packed_class(layer))


def unpack_linears(module: nn.Module) -> None:
    """Replace packed layers by ordinary ones of the same numbers."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedLinear | PackedModule):
                layer = nn.Linear(child.in_features, child.out_features)
                layer.weight, layer.bias = nn.Parameter(child.unpack()), child.bias
                setattr(parent, name, layer)


@pytest.mark.parametrize("packed_class", PACKED_CLASSES)
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3", "flux", "z_image"])
def test_hooks_add_the_lora_to_quantized_layers(name: str, packed_class: Any) -> None:
    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline(name).pipe))
    lora = make_lora(base, 8, "attention+mlp")
    pack_linears(base.denoiser, packed_class, lora)
    assert base.make_layout("attention+mlp", 2) == lora.layout  # not the shapes of packed weights
    with base.inject_lora(lora):
        for target, down, up in zip(lora.layout.targets, lora.down, lora.up, strict=True):
            layer = base.denoiser.get_submodule(target.path)
            assert isinstance(layer, packed_class)
            x = torch.randn(2, 3, target.in_features)
            expected = layer.forward(x) + x @ down.T @ up.T
            torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("packed_class", "has_adapter"),
    [(PackedLinear, False), (PackedLinear, True), (PackedModule, False)],
)
def test_quantized_bases_take_loras_in_every_strategy(
    name: str, packed_class: Any, has_adapter: bool, tmp_path: Path
) -> None:
    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline(name).pipe))
    lora, adapter = make_lora(base, 9, "attention+mlp"), make_lora(base, 10, "attention")
    pack_linears(base.denoiser, packed_class, lora)
    lora_path = save_lora(lora, tmp_path / "lora.safetensors")
    loaded = load_lora(lora_path, modules=base.modules).weights
    assert loaded.layout.targets == lora.layout.targets

    plain_base = DiffusionBase("tiny/base", deepcopy(base.pipeline))
    unpack_linears(plain_base.denoiser)
    with plain_base.inject_lora(lora), ExitStack() as stack:
        if has_adapter:
            stack.enter_context(plain_base.inject_lora(adapter))
        expected = sample(name, plain_base.pipeline, 1)
    assert (expected - sample(name, base.pipeline, 1)).abs().max() > 0.002

    if has_adapter:  # wrapped by PEFT
        adapter_path = save_lora(adapter, tmp_path / "x.safetensors", format="diffusers")
        base.pipeline.load_lora_weights(str(adapter_path), adapter_name="x")
    assert_all_equal(name, base, loaded, expected)


class OtherLayer(nn.Module):
    """A layer that says nothing of its features."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_layers_that_take_no_lora_are_named(tmp_path: Path) -> None:
    base = DiffusionBase("tiny/base", deepcopy(get_tiny_pipeline("flux").pipe))
    lora = make_lora(base, 11, "attention")
    path = save_lora(lora, tmp_path / "x.safetensors")
    attention = base.denoiser.get_submodule("transformer_blocks.0.attn")
    attention.to_q = OtherLayer()
    sentence = (
        r"transformer\.transformer_blocks\.0\.attn\.to_q of the base is a OtherLayer, to which no "
        "LoRA can be added: load the base as it is, or quantized by"
    )
    with pytest.raises(LayoutMismatchError, match=sentence):
        base.inject_lora(lora).__enter__()
    with pytest.raises(LayoutMismatchError, match=f"^x.safetensors cannot be used: {sentence}"):
        load_lora(path, modules=base.modules)
    del attention.to_q
    with pytest.raises(LayoutMismatchError, match="the base has no target module"):
        base.inject_lora(lora).__enter__()
