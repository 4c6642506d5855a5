"""``inject_lora`` against merged weights and PEFT, per sample, nested, and through autograd."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyperlora.diffusion.lora_injection import (
    inject_lora,
)
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import LayoutMismatchError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def make_random_lora(
    component: str, module: nn.Module, preset: str, *batch: int, seed: int = 0
) -> LoraWeights:
    layout = make_layout({component: module}, preset, 3, "tiny")
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights.unflatten(
        layout, 0.2 * torch.randn(*batch, layout.numel, generator=generator)
    )


def merge_into_copy(module: nn.Module, lora: LoraWeights) -> nn.Module:
    module = deepcopy(module)
    for target, delta in zip(lora.layout.targets, lora.get_delta_weights(), strict=True):
        layer = module.get_submodule(target.path)
        layer.weight = nn.Parameter(
            layer.weight + delta.reshape(layer.weight.shape), requires_grad=False
        )
    return module


def make_unet_inputs(n: int, seed: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents, text = (
        torch.randn(n, 4, 8, 8, generator=generator),
        torch.randn(n, 5, 16, generator=generator),
    )
    return latents, torch.arange(n) * 100 + 1, text


def run_unet(unet: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return unet(*inputs).sample


def run_transformer(transformer: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    latents, timestep, text = inputs
    pooled = text[:, 0, :8]
    return transformer(
        latents, encoder_hidden_states=text, pooled_projections=pooled, timestep=timestep
    ).sample


def run_with_peft(
    module: nn.Module, lora: LoraWeights, run: Callable[[nn.Module], Tensor]
) -> Tensor:
    from peft import LoraConfig, inject_adapter_in_model

    rank, paths = lora.layout.rank, [target.path for target in lora.layout.targets]
    module = inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=paths), deepcopy(module)
    )
    for target, down, up in zip(lora.layout.targets, lora.down, lora.up, strict=True):
        layer = module.get_submodule(target.path)
        for factor, value in ((layer.lora_A["default"], down), (layer.lora_B["default"], up)):
            factor.weight.data = value.reshape(factor.weight.shape).clone()
    return run(module.eval())


@pytest.mark.parametrize("preset", ["attention", "attention+mlp", "attention+conv"])
def test_inject_lora_equals_merged_unet_and_peft(unet: nn.Module, preset: str) -> None:
    lora, inputs = make_random_lora("unet", unet, preset), make_unet_inputs(2)
    base_output = run_unet(unet, inputs)
    with inject_lora(unet, lora):
        output = run_unet(unet, inputs)
    torch.testing.assert_close(output, run_unet(merge_into_copy(unet, lora), inputs), **TOLERANCE)
    torch.testing.assert_close(
        output, run_with_peft(unet, lora, lambda m: run_unet(m, inputs)), **TOLERANCE
    )
    assert (output - base_output).abs().max() > 1e-2
    assert torch.equal(run_unet(unet, inputs), base_output)


def test_inject_lora_equals_merged_transformer_and_peft(transformer: nn.Module) -> None:
    lora, inputs = (
        make_random_lora("transformer", transformer, "attention+mlp", seed=1),
        make_unet_inputs(2),
    )
    base_output = run_transformer(transformer, inputs)
    with inject_lora(transformer, lora):
        output = run_transformer(transformer, inputs)
    torch.testing.assert_close(
        output, run_transformer(merge_into_copy(transformer, lora), inputs), **TOLERANCE
    )
    torch.testing.assert_close(
        output, run_with_peft(transformer, lora, lambda m: run_transformer(m, inputs)), **TOLERANCE
    )
    assert (output - base_output).abs().max() > 1e-2


@pytest.mark.parametrize("preset", ["attention+mlp", "attention+conv"])
def test_inject_lora_gives_every_sample_its_own_lora(unet: nn.Module, preset: str) -> None:
    loras, inputs = make_random_lora("unet", unet, preset, 3), make_unet_inputs(6)
    with inject_lora(unet, loras):
        output = run_unet(unet, inputs)
    for i in range(6):
        alone = run_unet(merge_into_copy(unet, loras[i % 3]), tuple(x[i : i + 1] for x in inputs))
        torch.testing.assert_close(output[i : i + 1], alone, **TOLERANCE)


def test_inject_lora_gives_every_transformer_sample_its_own_lora(transformer: nn.Module) -> None:
    loras, inputs = (
        make_random_lora("transformer", transformer, "attention", 2),
        make_unet_inputs(4),
    )
    with inject_lora(transformer, loras):
        output = run_transformer(transformer, inputs)
    for i in range(4):
        alone = run_transformer(
            merge_into_copy(transformer, loras[i % 2]), tuple(x[i : i + 1] for x in inputs)
        )
        torch.testing.assert_close(output[i : i + 1], alone, **TOLERANCE)


def test_inject_lora_adapts_text_encoder_and_unet_together(
    unet: nn.Module, text_encoder: nn.Module
) -> None:
    tokens = torch.tensor([[0, 7, 8, 1], [0, 9, 3, 1]])
    modules = {"unet": unet, "text_encoder": text_encoder}
    layout = make_layout(modules, "attention", 3, "tiny")
    loras = LoraWeights.unflatten(
        layout, 0.2 * torch.randn(2, layout.numel, generator=torch.Generator().manual_seed(0))
    )
    latents, timestep, _ = make_unet_inputs(2)
    with inject_lora(modules, loras):
        text = text_encoder(tokens).last_hidden_state
        output = run_unet(unet, (latents, timestep, text))
    for i in range(2):
        parts = {
            name: LoraWeights(
                make_layout({name: module}, "attention", 3, "tiny"),
                tuple(
                    d[i]
                    for s, d in zip(layout.targets, loras.down, strict=True)
                    if s.component == name
                ),
                tuple(
                    u[i]
                    for s, u in zip(layout.targets, loras.up, strict=True)
                    if s.component == name
                ),
            )
            for name, module in modules.items()
        }
        alone = merge_into_copy(text_encoder, parts["text_encoder"])(
            tokens[i : i + 1]
        ).last_hidden_state
        torch.testing.assert_close(text[i : i + 1], alone, **TOLERANCE)
        expected = run_unet(
            merge_into_copy(unet, parts["unet"]), (latents[i : i + 1], timestep[i : i + 1], alone)
        )
        torch.testing.assert_close(output[i : i + 1], expected, **TOLERANCE)


def test_inject_lora_contexts_add_up(unet: nn.Module) -> None:
    a, b = (make_random_lora("unet", unet, "attention+conv", seed=seed) for seed in (0, 1))
    inputs = make_unet_inputs(2)
    with inject_lora(unet, a + b):
        expected = run_unet(unet, inputs)
    with inject_lora(unet, a), inject_lora(unet, b):
        torch.testing.assert_close(run_unet(unet, inputs), expected, **TOLERANCE)
    only_a = run_unet(merge_into_copy(unet, a), inputs)
    with inject_lora(unet, a):
        with inject_lora(unet, b):
            pass
        torch.testing.assert_close(run_unet(unet, inputs), only_a, **TOLERANCE)


def test_inject_lora_closes_on_errors(unet: nn.Module) -> None:
    inputs = make_unet_inputs(1)
    base_output = run_unet(unet, inputs)
    with (
        pytest.raises(ZeroDivisionError),
        inject_lora(unet, make_random_lora("unet", unet, "attention")),
    ):
        _ = 1 / 0
    assert torch.equal(run_unet(unet, inputs), base_output)


@pytest.mark.parametrize("preset", ["attention", "attention+conv"])
def test_inject_lora_separates_the_gradients_of_samples(unet: nn.Module, preset: str) -> None:
    loras, inputs = make_random_lora("unet", unet, preset, 3), make_unet_inputs(3)
    flat = loras.flatten().requires_grad_()
    with inject_lora(unet, LoraWeights.unflatten(loras.layout, flat)):
        run_unet(unet, inputs)[1].square().sum().backward()
    assert flat.grad is not None
    assert flat.grad[[0, 2]].eq(0).all()
    alone = loras[1].flatten().requires_grad_()
    with inject_lora(unet, LoraWeights.unflatten(loras.layout, alone)):
        run_unet(unet, tuple(x[1:2] for x in inputs)).square().sum().backward()
    torch.testing.assert_close(flat.grad[1], alone.grad, rtol=1e-3, atol=1e-4)
    assert alone.grad is not None
    assert alone.grad.abs().sum() > 0


@pytest.mark.parametrize("which", ["unet", "transformer", "text_encoder"])
def test_gradient_checkpointing_keeps_gradients_after_the_context(
    which: str, request: pytest.FixtureRequest
) -> None:
    module: nn.Module = request.getfixturevalue(which).train()
    lora = make_random_lora(which, module, "attention", 2)

    def compute_gradient() -> Tensor:
        flat = lora.flatten().requires_grad_()
        latents, timestep, text = make_unet_inputs(2)
        with inject_lora(module, LoraWeights.unflatten(lora.layout, flat)):
            if which == "text_encoder":
                output = module(torch.tensor([[0, 7, 8, 1], [0, 9, 3, 1]])).last_hidden_state
            else:
                run = run_unet if which == "unet" else run_transformer
                output = run(module, (latents.requires_grad_(), timestep, text.requires_grad_()))
        output.square().sum().backward()
        assert flat.grad is not None
        return flat.grad

    expected = compute_gradient()
    if which == "text_encoder":
        module.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        module.enable_gradient_checkpointing()
    torch.testing.assert_close(compute_gradient(), expected, rtol=1e-3, atol=1e-4)
    assert expected.abs().sum() > 0


def test_inject_lora_autocasts_with_float32_gradients(unet: nn.Module) -> None:
    loras, inputs = make_random_lora("unet", unet, "attention+conv", 2), make_unet_inputs(2)
    with inject_lora(unet, loras):
        exact = run_unet(unet, inputs)
    flat = loras.flatten().requires_grad_()
    with (
        torch.autocast("cpu", torch.bfloat16),
        inject_lora(unet, LoraWeights.unflatten(loras.layout, flat)),
    ):
        output = run_unet(unet, inputs)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() < 0.05 * exact.norm()
    output.float().square().sum().backward()
    assert flat.grad is not None
    assert flat.grad.dtype == torch.float32
    assert flat.grad.isfinite().all()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_inject_lora_fits_a_batch_like_single_loras(
    unet: nn.Module, optimizer: type[torch.optim.Optimizer]
) -> None:
    start, inputs = make_random_lora("unet", unet, "attention+conv", 3), make_unet_inputs(3)
    target = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    def fit(index: slice) -> Tensor:
        flat = start.flatten()[index].clone().requires_grad_()
        steps = optimizer([flat], lr=1e-2)
        for _ in range(3):
            with inject_lora(unet, LoraWeights.unflatten(start.layout, flat)):
                error = run_unet(unet, tuple(x[index] for x in inputs)) - target[index]
            steps.zero_grad()
            error.square().flatten(1).mean(1).sum().backward()
            steps.step()
        return flat.detach()

    together = fit(slice(None))
    alone = torch.cat([fit(slice(i, i + 1)) for i in range(3)])
    assert (together - start.flatten()).abs().max() > 1e-4
    moved = (alone - start.flatten()).norm()
    assert (together - alone).norm() < 1e-3 * moved


def test_inject_lora_rejects_mismatched_layouts(unet: nn.Module, text_encoder: nn.Module) -> None:
    def assert_rejected(model: nn.Module, lora: LoraWeights, message: str) -> None:
        with pytest.raises(LayoutMismatchError, match=message), inject_lora(model, lora):
            run_unet(unet, make_unet_inputs(3))

    lora = make_random_lora("unet", unet, "attention")
    assert_rejected(
        text_encoder, lora, r"no target module unet\.down_blocks.*\(tiny\) is not for it"
    )
    wider = deepcopy(unet)
    wider.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1").to_q = nn.Linear(
        16, 24
    )
    assert_rejected(wider, lora, r"mid_block.*to_q is \(16, 24\) in the base, \(16, 16\)")
    both = make_layout({"unet": unet, "text_encoder": text_encoder}, "attention", 2, "tiny")
    assert_rejected(unet, LoraWeights.zeros(both), "unet, text_encoder: pass a mapping")
    assert_rejected(
        unet, make_random_lora("unet", unet, "attention", 2), "3 samples cannot share 2 LoRAs"
    )
    assert_rejected(
        unet, make_random_lora("unet", unet, "attention", 2, 2), "one batch axis expected"
    )


class CheckpointedBlock(nn.Module):
    """A block that gets a keyword through its checkpoint function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 6, bias=False)
        self.gradient_checkpointing = True
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._gradient_checkpointing_func(self.scale, x, factor=3.0)

    def scale(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return factor * self.layer(x)


def test_checkpointed_blocks_get_their_keywords() -> None:
    model = CheckpointedBlock()
    layout = LoraLayout((TargetModule("unet.layer", 5, 6),), 2, "tiny")
    lora = LoraWeights.unflatten(layout, torch.randn(layout.numel))
    (delta,) = lora.get_delta_weights()
    x = torch.randn(4, 5, requires_grad=True)
    with inject_lora(model, lora):
        output = model(x)
    torch.testing.assert_close(output, 3 * x @ (model.layer.weight + delta).mT)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, 3 * (model.layer.weight + delta).sum(0).expand(4, 5))


@pytest.mark.parametrize("num_loras", [None, 2])
def test_convolutions_keep_stride_padding_and_dilation(num_loras: int | None) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(3, 1), dilation=(2, 3))
    module, x = nn.Sequential(layer), torch.randn(4, 3, 9, 11)
    layout = LoraLayout((TargetModule("unet.0", 3 * 6, 4, (3, 2)),), 2, "tiny/base")
    loras = LoraWeights.unflatten(layout, torch.randn(num_loras or 1, layout.numel))
    with torch.no_grad(), inject_lora(module, loras if num_loras else loras[0]):
        output = module(x)
    for i, delta in enumerate(loras.get_delta_weights()[0]):
        merged = deepcopy(layer).requires_grad_(False)
        merged.weight += delta.view_as(merged.weight)
        step = len(loras)
        torch.testing.assert_close(output[i::step], merged(x[i::step]), **TOLERANCE)


def test_checkpointed_blocks_get_their_own_function_back(unet: nn.Module) -> None:
    unet = deepcopy(unet)
    lora, name = make_random_lora("unet", unet, "attention"), "_gradient_checkpointing_func"
    unet.enable_gradient_checkpointing()

    def list_functions() -> dict[str, Any]:
        return {
            path: getattr(block, name)
            for path, block in unet.named_modules()
            if getattr(block, "gradient_checkpointing", False)
        }

    before = list_functions()
    assert before and all(callable(function) for function in before.values())
    for _ in range(2):
        with inject_lora(unet, lora):
            inside = list_functions()
        assert inside.keys() == before.keys()
        assert all(inside[path] is not before[path] for path in before)
        assert list_functions() == before
    unet.disable_gradient_checkpointing()
    functions = {path: getattr(block, name, None) for path, block in unet.named_modules()}
    with inject_lora(unet, lora):
        now = {path: getattr(block, name, None) for path, block in unet.named_modules()}
    assert now == functions, "blocks that are not checkpointed keep it"
