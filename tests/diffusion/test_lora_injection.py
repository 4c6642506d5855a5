"""``inject_lora`` against merged weights and against PEFT, per sample, nested, and through autograd."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import LayoutMismatchError
from hyperlora.lora.weights import LoraWeights

SEEING = {"rtol": 1e-4, "atol": 1e-5}


def random_lora(
    component: str, module: nn.Module, preset: str, *batch: int, seed: int = 0
) -> LoraWeights:
    layout = make_layout({component: module}, preset, 3, "tiny")
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights.unflatten(
        layout, 0.2 * torch.randn(*batch, layout.numel, generator=generator)
    )


def merged(module: nn.Module, lora: LoraWeights) -> nn.Module:
    module = deepcopy(module)
    for site, delta in zip(lora.layout.targets, lora.get_delta_weights(), strict=True):
        layer = module.get_submodule(site.path)
        layer.weight = nn.Parameter(
            layer.weight + delta.reshape(layer.weight.shape), requires_grad=False
        )
    return module


def unet_inputs(n: int, seed: int = 9) -> tuple[Tensor, Tensor, Tensor]:
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


def peft_output(module: nn.Module, lora: LoraWeights, run: Callable[[nn.Module], Tensor]) -> Tensor:
    from peft import LoraConfig, inject_adapter_in_model

    rank, paths = lora.layout.rank, [site.path for site in lora.layout.targets]
    module = inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=paths), deepcopy(module)
    )
    for site, down, up in zip(lora.layout.targets, lora.down, lora.up, strict=True):
        layer = module.get_submodule(site.path)
        for factor, value in ((layer.lora_A["default"], down), (layer.lora_B["default"], up)):
            factor.weight.data = value.reshape(factor.weight.shape).clone()
    return run(module.eval())


@pytest.mark.parametrize("preset", ["attention", "attention+mlp", "attention+conv"])
def test_unet_equals_merged_and_peft(unet: nn.Module, preset: str) -> None:
    lora, inputs = random_lora("unet", unet, preset), unet_inputs(2)
    plain = run_unet(unet, inputs)
    with inject_lora(unet, lora):
        output = run_unet(unet, inputs)
    torch.testing.assert_close(output, run_unet(merged(unet, lora), inputs), **SEEING)
    torch.testing.assert_close(
        output, peft_output(unet, lora, lambda m: run_unet(m, inputs)), **SEEING
    )
    assert (output - plain).abs().max() > 1e-2
    assert torch.equal(run_unet(unet, inputs), plain)


def test_dit_equals_merged_and_peft(transformer: nn.Module) -> None:
    lora, inputs = random_lora("transformer", transformer, "attention+mlp", seed=1), unet_inputs(2)
    plain = run_transformer(transformer, inputs)
    with inject_lora(transformer, lora):
        output = run_transformer(transformer, inputs)
    torch.testing.assert_close(output, run_transformer(merged(transformer, lora), inputs), **SEEING)
    torch.testing.assert_close(
        output, peft_output(transformer, lora, lambda m: run_transformer(m, inputs)), **SEEING
    )
    assert (output - plain).abs().max() > 1e-2


@pytest.mark.parametrize("preset", ["attention+mlp", "attention+conv"])
def test_every_sample_has_its_own_lora_also_in_a_doubled_batch(
    unet: nn.Module, preset: str
) -> None:
    loras, inputs = random_lora("unet", unet, preset, 3), unet_inputs(6)
    with inject_lora(unet, loras):
        output = run_unet(unet, inputs)
    for i in range(6):
        alone = run_unet(merged(unet, loras[i % 3]), tuple(x[i : i + 1] for x in inputs))
        torch.testing.assert_close(output[i : i + 1], alone, **SEEING)


def test_dit_samples_have_their_own_loras(transformer: nn.Module) -> None:
    loras, inputs = random_lora("transformer", transformer, "attention", 2), unet_inputs(4)
    with inject_lora(transformer, loras):
        output = run_transformer(transformer, inputs)
    for i in range(4):
        alone = run_transformer(
            merged(transformer, loras[i % 2]), tuple(x[i : i + 1] for x in inputs)
        )
        torch.testing.assert_close(output[i : i + 1], alone, **SEEING)


def test_text_encoder_and_unet_together(unet: nn.Module, text_encoder: nn.Module) -> None:
    tokens = torch.tensor([[0, 7, 8, 1], [0, 9, 3, 1]])
    modules = {"unet": unet, "text_encoder": text_encoder}
    layout = make_layout(modules, "attention", 3, "tiny")
    loras = LoraWeights.unflatten(
        layout, 0.2 * torch.randn(2, layout.numel, generator=torch.Generator().manual_seed(0))
    )
    latents, timestep, _ = unet_inputs(2)
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
        alone = merged(text_encoder, parts["text_encoder"])(tokens[i : i + 1]).last_hidden_state
        torch.testing.assert_close(text[i : i + 1], alone, **SEEING)
        expected = run_unet(
            merged(unet, parts["unet"]), (latents[i : i + 1], timestep[i : i + 1], alone)
        )
        torch.testing.assert_close(output[i : i + 1], expected, **SEEING)


def test_nested_contexts_add_up(unet: nn.Module) -> None:
    a, b = (random_lora("unet", unet, "attention+conv", seed=seed) for seed in (0, 1))
    inputs = unet_inputs(2)
    with inject_lora(unet, a + b):
        expected = run_unet(unet, inputs)
    with inject_lora(unet, a), inject_lora(unet, b):
        torch.testing.assert_close(run_unet(unet, inputs), expected, **SEEING)
    only_a = run_unet(merged(unet, a), inputs)
    with inject_lora(unet, a):
        with inject_lora(unet, b):
            pass
        torch.testing.assert_close(run_unet(unet, inputs), only_a, **SEEING)


def test_contexts_close_on_errors(unet: nn.Module) -> None:
    inputs = unet_inputs(1)
    plain = run_unet(unet, inputs)
    with (
        pytest.raises(ZeroDivisionError),
        inject_lora(unet, random_lora("unet", unet, "attention")),
    ):
        _ = 1 / 0
    assert torch.equal(run_unet(unet, inputs), plain)


@pytest.mark.parametrize("preset", ["attention", "attention+conv"])
def test_gradients_of_one_sample_do_not_touch_the_others(unet: nn.Module, preset: str) -> None:
    loras, inputs = random_lora("unet", unet, preset, 3), unet_inputs(3)
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
def test_checkpointing_gives_the_same_gradients_after_the_context_has_closed(
    which: str, request: pytest.FixtureRequest
) -> None:
    module: nn.Module = request.getfixturevalue(which).train()
    lora = random_lora(which, module, "attention", 2)

    def gradient() -> Tensor:
        flat = lora.flatten().requires_grad_()
        latents, timestep, text = unet_inputs(2)
        with inject_lora(module, LoraWeights.unflatten(lora.layout, flat)):
            if which == "text_encoder":
                output = module(torch.tensor([[0, 7, 8, 1], [0, 9, 3, 1]])).last_hidden_state
            else:
                run = run_unet if which == "unet" else run_transformer
                output = run(module, (latents.requires_grad_(), timestep, text.requires_grad_()))
        output.square().sum().backward()
        assert flat.grad is not None
        return flat.grad

    expected = gradient()
    if which == "text_encoder":
        module.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        module.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), expected, rtol=1e-3, atol=1e-4)
    assert expected.abs().sum() > 0


def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients(unet: nn.Module) -> None:
    loras, inputs = random_lora("unet", unet, "attention+conv", 2), unet_inputs(2)
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
def test_fitting_k_at_once_is_fitting_one_by_one(
    unet: nn.Module, optimizer: type[torch.optim.Optimizer]
) -> None:
    start, inputs = random_lora("unet", unet, "attention+conv", 3), unet_inputs(3)
    target = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    def fitted(index: slice) -> Tensor:
        flat = start.flatten()[index].clone().requires_grad_()
        steps = optimizer([flat], lr=1e-2)
        for _ in range(3):
            with inject_lora(unet, LoraWeights.unflatten(start.layout, flat)):
                error = run_unet(unet, tuple(x[index] for x in inputs)) - target[index]
            steps.zero_grad()
            error.square().flatten(1).mean(1).sum().backward()
            steps.step()
        return flat.detach()

    together = fitted(slice(None))
    alone = torch.cat([fitted(slice(i, i + 1)) for i in range(3)])
    assert (together - start.flatten()).abs().max() > 1e-4
    moved = (alone - start.flatten()).norm()
    assert (together - alone).norm() < 1e-3 * moved


def test_errors_name_what_is_wrong(unet: nn.Module, text_encoder: nn.Module) -> None:
    def refused(target: nn.Module, lora: LoraWeights, sentence: str) -> None:
        with pytest.raises(LayoutMismatchError, match=sentence), inject_lora(target, lora):
            run_unet(unet, unet_inputs(3))

    lora = random_lora("unet", unet, "attention")
    refused(text_encoder, lora, r"no site unet\.down_blocks.*\(tiny\) is not for it")
    wider = deepcopy(unet)
    wider.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1").to_q = nn.Linear(
        16, 24
    )
    refused(wider, lora, r"mid_block.*to_q is \(16, 24\) in the base, \(16, 16\)")
    both = make_layout({"unet": unet, "text_encoder": text_encoder}, "attention", 2, "tiny")
    refused(unet, LoraWeights.zeros(both), "unet, text_encoder: pass a mapping")
    refused(unet, random_lora("unet", unet, "attention", 2), "3 samples cannot share 2 LoRAs")
    refused(unet, random_lora("unet", unet, "attention", 2, 2), "one batch axis expected")
