"""LoRA files load in diffusers pipelines without warnings and act as ``inject_lora`` does."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.weights import LoraWeights

Make = Callable[..., LoraWeights]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TOKENS = torch.tensor([[0, 7, 8, 1, 1, 1]])


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Function that returns the warnings of diffusers, transformers and peft so far."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    levels = [(logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    yield lambda: [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ]
    for logger, (propagate, level) in zip(loggers, levels, strict=True):
        logger.propagate = propagate
        logger.setLevel(level)


def run_pipeline(pipe: Any) -> dict[str, Tensor]:
    """Text states, one denoiser call, and a whole image with guidance."""
    with torch.no_grad():
        text = pipe.text_encoder(TOKENS).last_hidden_state
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        noise = pipe.unet(latents, 500, text).sample
        image = pipe(
            prompt_embeds=text,
            negative_prompt_embeds=torch.zeros_like(text),
            latents=latents,
            num_inference_steps=2,
            output_type="pt",
        ).images
    return {"text": text, "noise": noise, "image": image}


def assert_all_loaded(module: nn.Module, lora: LoraWeights, component: str) -> None:
    """Exactly the targets of ``component`` have an adapter, with the numbers of the LoRA."""
    adapted = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    assert set(adapted) == {
        target.path for target in lora.layout.targets if target.component == component
    }
    for target, down, up in zip(lora.layout.targets, lora.down, lora.up, strict=True):
        if target.component == component:
            layer = adapted[target.path]
            (adapter,) = layer.lora_A
            assert torch.equal(layer.lora_A[adapter].weight.flatten(1), down)
            assert torch.equal(layer.lora_B[adapter].weight.flatten(1), up)
            assert layer.scaling[adapter] == 1


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("preset", ["attention", "attention+mlp", "attention+conv"])
def test_pipeline_loads_every_key_with_equal_outputs(
    pipe: Any,
    modules: dict[str, nn.Module],
    random_lora: Make,
    tmp_path: Path,
    warnings: Callable[[], list[str]],
    format: Any,
    preset: str,
) -> None:
    lora = random_lora(modules, preset)
    base_outputs = run_pipeline(pipe)
    with inject_lora(modules, lora):
        outputs = run_pipeline(pipe)
    path = save_lora(
        lora, tmp_path / "x.safetensors", format=format, metadata=LoraMetadata(title="Ada")
    )
    num_warnings = len(warnings())
    pipe.load_lora_weights(str(path))
    assert warnings()[num_warnings:] == []
    for component, module in modules.items():
        assert_all_loaded(module, lora, component)
    expected = run_pipeline(pipe)
    for name, value in outputs.items():
        torch.testing.assert_close(
            value, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert (value - base_outputs[name]).abs().max() > 1e-3, name


def test_transformer_loads_every_key_with_equal_outputs(
    transformer: nn.Module, random_lora: Make, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    lora = random_lora({"transformer": transformer}, "attention+mlp")
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
        "pooled_projections": torch.randn(2, 8, generator=generator),
        "timestep": torch.tensor([10.0, 500.0]),
    }
    with torch.no_grad(), inject_lora(transformer, lora):
        output = transformer(**inputs).sample
    path = save_lora(lora, tmp_path / "x.safetensors")
    num_warnings = len(warnings())
    transformer.load_lora_adapter(str(path), prefix="transformer")  # type: ignore[operator]
    assert warnings()[num_warnings:] == []
    assert_all_loaded(transformer, lora, "transformer")
    with torch.no_grad():
        torch.testing.assert_close(transformer(**inputs).sample, output, **CLOSE)


def test_sdxl_file_keeps_both_text_encoders_in_diffusers(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path
) -> None:
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
    from transformers import CLIPTextModelWithProjection

    modules = {
        **modules,
        "text_encoder_2": CLIPTextModelWithProjection(modules["text_encoder"].config),
    }
    lora = random_lora(modules, "attention")
    path = save_lora(lora, tmp_path / "x.safetensors", format="kohya")
    assert torch.equal(load_lora(path, modules=modules).weights.flatten(), lora.flatten())
    state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        load_file(path), unet_config=modules["unet"].config
    )
    counts = {
        component: sum(key.startswith(f"{component}.") for key in state) for component in modules
    }
    components = [target.component for target in lora.layout.targets]
    assert counts == {component: 2 * components.count(component) for component in modules}
    assert set(alphas.values()) == {3.0}


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_load_lora_scales_by_alpha_as_diffusers(
    pipe: Any, modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path, format: Any
) -> None:
    lora = random_lora({"unet": modules["unet"]}, "attention", rank=4)
    path = save_lora(lora, tmp_path / "x.safetensors", format=format)
    tensors, metadata = load_file(path), None
    if format == "kohya":
        tensors = {
            key: torch.tensor(2.0) if key.endswith(".alpha") else tensor
            for key, tensor in tensors.items()
        }
    else:
        names = [target.path for target in lora.layout.targets]
        config = {"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": names}
        metadata = {"lora_adapter_metadata": json.dumps(config)}
    save_file(tensors, path, metadata=metadata)
    loaded = load_lora(path, modules=modules).weights
    with inject_lora({"unet": pipe.unet}, loaded):
        outputs = run_pipeline(pipe)
    pipe.load_lora_weights(str(path))
    torch.testing.assert_close(run_pipeline(pipe)["noise"], outputs["noise"], **CLOSE)
    for delta, full_delta in zip(loaded.get_delta_weights(), lora.get_delta_weights(), strict=True):
        torch.testing.assert_close(delta, full_delta / 2)


@pytest.mark.parametrize("preset", ["attention", "attention+conv"])
def test_load_lora_reads_files_of_diffusers(
    pipe: Any, modules: dict[str, nn.Module], tmp_path: Path, preset: str
) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    layout = make_layout(modules, preset, 4, "tiny/base")
    layers, configs = {}, {}
    for component, module in modules.items():
        paths = [target.path for target in layout.targets if target.component == component]
        config = LoraConfig(r=4, lora_alpha=6, target_modules=paths, init_lora_weights=False)
        module.add_adapter(config)  # type: ignore[operator]
        layers[component] = (
            convert_state_dict_to_diffusers(
                get_peft_model_state_dict(module, adapter_name="default")
            )
            if (component == "unet")
            else get_peft_model_state_dict(module, adapter_name="default")
        )
        configs[component] = config.to_dict()
    expected = run_pipeline(pipe)
    type(pipe).save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=configs["unet"],
        text_encoder_lora_adapter_metadata=configs["text_encoder"],
    )
    pipe.unload_lora_weights()
    lora = load_lora(tmp_path / "pytorch_lora_weights.safetensors", modules=modules).weights
    assert len(lora.layout.targets) == len(layout.targets)
    with inject_lora(modules, lora):
        outputs = run_pipeline(pipe)
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, **CLOSE)
