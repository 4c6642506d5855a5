"""Files load in real diffusers pipelines, completely and silently, and act there as ``inject_lora`` acts here."""

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
SEEING = {"rtol": 1e-4, "atol": 1e-5}
TOKENS = torch.tensor([[0, 7, 8, 1, 1, 1]])


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Calling it gives what diffusers, transformers or peft complained about so far."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    before = [(logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    yield lambda: [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ]
    for logger, (propagate, level) in zip(loggers, before, strict=True):
        logger.propagate = propagate
        logger.setLevel(level)


def outputs(pipe: Any) -> dict[str, Tensor]:
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


def assert_all_taken(module: nn.Module, lora: LoraWeights, component: str) -> None:
    """Exactly the sites of ``component`` carry an adapter, with the LoRA's own numbers."""
    adapted = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    assert set(adapted) == {
        site.path for site in lora.layout.targets if site.component == component
    }
    for site, down, up in zip(lora.layout.targets, lora.down, lora.up, strict=True):
        if site.component == component:
            layer = adapted[site.path]
            (adapter,) = layer.lora_A
            assert torch.equal(layer.lora_A[adapter].weight.flatten(1), down)
            assert torch.equal(layer.lora_B[adapter].weight.flatten(1), up)
            assert layer.scaling[adapter] == 1


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("preset", ["attention", "attention+mlp", "attention+conv"])
def test_a_pipeline_takes_every_key_and_acts_alike(
    pipe: Any,
    modules: dict[str, nn.Module],
    random_lora: Make,
    tmp_path: Path,
    warnings: Callable[[], list[str]],
    format: Any,
    preset: str,
) -> None:
    lora = random_lora(modules, preset)
    plain = outputs(pipe)
    with inject_lora(modules, lora):
        mine = outputs(pipe)
    path = save_lora(
        lora, tmp_path / "x.safetensors", format=format, metadata=LoraMetadata(title="Ada")
    )
    complaints = len(warnings())
    pipe.load_lora_weights(str(path))
    assert warnings()[complaints:] == []
    for component, module in modules.items():
        assert_all_taken(module, lora, component)
    theirs = outputs(pipe)
    for name, value in mine.items():
        torch.testing.assert_close(
            value, theirs[name], **SEEING, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert (value - plain[name]).abs().max() > 1e-3, name


def test_a_dit_takes_every_key_and_acts_alike(
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
        mine = transformer(**inputs).sample
    path = save_lora(lora, tmp_path / "x.safetensors")
    complaints = len(warnings())
    transformer.load_lora_adapter(str(path), prefix="transformer")  # type: ignore[operator]
    assert warnings()[complaints:] == []
    assert_all_taken(transformer, lora, "transformer")
    with torch.no_grad():
        torch.testing.assert_close(transformer(**inputs).sample, mine, **SEEING)


def test_sdxl_file_maps_both_text_encoders_by_diffusers_own_reader(
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
    sites = [site.component for site in lora.layout.targets]
    assert counts == {component: 2 * sites.count(component) for component in modules}
    assert set(alphas.values()) == {3.0}


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_alpha_other_than_rank_reads_as_diffusers_reads_it(
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
        names = [site.path for site in lora.layout.targets]
        config = {"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": names}
        metadata = {"lora_adapter_metadata": json.dumps(config)}
    save_file(tensors, path, metadata=metadata)
    read = load_lora(path, modules=modules).weights
    with inject_lora({"unet": pipe.unet}, read):
        mine = outputs(pipe)
    pipe.load_lora_weights(str(path))
    torch.testing.assert_close(outputs(pipe)["noise"], mine["noise"], **SEEING)
    for delta, full in zip(read.get_delta_weights(), lora.get_delta_weights(), strict=True):
        torch.testing.assert_close(delta, full / 2)


@pytest.mark.parametrize("preset", ["attention", "attention+conv"])
def test_files_written_by_diffusers_are_read(
    pipe: Any, modules: dict[str, nn.Module], tmp_path: Path, preset: str
) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    layout = make_layout(modules, preset, 4, "tiny/base")
    layers, configs = {}, {}
    for component, module in modules.items():
        paths = [site.path for site in layout.targets if site.component == component]
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
    theirs = outputs(pipe)
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
        mine = outputs(pipe)
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, **SEEING)
