"""Families x presets x formats x text encoders: which program reads which file, and right.

diffusers loads every file itself, and gives the ΔW of the LoRA. What the other programs read is
computed by ``program_keys`` and ``comfyui_transformers``. ``READERS`` must say the same.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load, load_file
from torch import Tensor, nn

from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.lora.io.formats import (
    READERS,
    UNET_FAMILIES,
    detect_family,
    list_readers,
    resolve_format,
)
from hyperlora.lora.io.keys import format_file_key
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.io.written_keys import has_written_keys
from hyperlora.lora.weights import LoraWeights
from tests.lora.io import comfyui_transformers, program_keys, unet_bases
from tests.tiny_pipelines import get_tiny_pipeline

TINY_NAMES = {
    "SD3": "stable_diffusion_3",
    "FLUX.1": "flux",
    "Chroma": "chroma",
    "FLUX.2": "flux2_klein",
    "Qwen-Image": "qwen_image",
    "Qwen-Image 2.1": "qwen_image_21",
    "Z-Image": "z_image",
    "Lumina 2": "lumina_2",
    "HiDream": "hidream",
    "Krea 2": "krea_2",
}
FAST = ("SD 1.x", "SD 2.x", "SDXL", "SD3", "FLUX.1", "FLUX.2", "Qwen-Image", "Z-Image", "Lumina 2")
REAL_WIDTH_ALONE = {("FLUX.1", "comfyui"), ("Chroma", "comfyui")}
"""Fused layers that diffusers splits at the real width alone."""


class Case(NamedTuple):
    family: str
    preset: str
    format: Any
    with_text_encoder: bool


CASES = [
    Case(family, preset, format, with_text_encoder)
    for family, formats in READERS.items()
    for preset in ("attention", "attention+mlp", *(["attention+conv"] * (family in UNET_FAMILIES)))
    for format in formats
    for with_text_encoder in (False, *([True] * (family in (*UNET_FAMILIES, "SD3", "FLUX.1"))))
]


def make_id(case: Case) -> str:
    return "-".join((*case[:3], "text" if case.with_text_encoder else "plain"))


SDXL_FAST = (
    ("attention", "diffusers", False),
    ("attention+mlp", "kohya", True),
    ("attention+conv", "sgm", True),
)


def is_fast(case: Case) -> bool:
    """Whether a case runs by default: every family, preset and format, but not all together."""
    if case.family == "SDXL":
        return case[1:] in SDXL_FAST
    if case.family in UNET_FAMILIES:
        return case.with_text_encoder == (case.preset != "attention")
    return case.family in FAST and (case.preset == "attention+mlp" or case.format == "comfyui")


def mark_cases() -> list[Any]:
    return [
        pytest.param(case, id=make_id(case), marks=[] if is_fast(case) else pytest.mark.heavy)
        for case in CASES
    ]


@cache
def get_modules(family: str) -> dict[str, nn.Module]:
    """The denoiser and the text encoders that take a LoRA, by component."""
    if family in UNET_FAMILIES:
        return unet_bases.make_modules(family)
    adapter = get_pipeline_family(get_tiny_pipeline(TINY_NAMES[family]).pipe)
    return {"transformer": adapter.denoiser} | {
        name: adapter.text_encoders[name] for name in adapter.adaptable_text_encoders
    }


def get_architecture(family: str) -> str:
    if family in UNET_FAMILIES:
        return unet_bases.ARCHITECTURES[family]
    return get_pipeline_family(get_tiny_pipeline(TINY_NAMES[family]).pipe).architecture


def make_case_lora(case: Case) -> LoraWeights:
    modules = get_modules(case.family)
    if not case.with_text_encoder:
        modules = {name: m for name, m in modules.items() if name in ("unet", "transformer")}
    layout = make_layout(modules, case.preset, 2, "tiny/base")
    generator = torch.Generator().manual_seed(1)
    return LoraWeights.unflatten(layout, torch.randn(layout.numel, generator=generator) / 4)


def compute_target_deltas(lora: LoraWeights) -> dict[str, Tensor]:
    """ΔW by the name of the target in files."""
    return {
        format_file_key(target.name): up @ down
        for target, down, up in zip(lora.layout.targets, lora.down, lora.up, strict=True)
    }


@pytest.mark.parametrize("case", mark_cases())
def test_readers_are_those_that_read_every_target_right(case: Case, tmp_path: Path) -> None:
    lora, modules = make_case_lora(case), get_modules(case.family)
    architecture = get_architecture(case.family)
    metadata = LoraMetadata(title="matrix", architecture=architecture)
    path = save_lora(lora, tmp_path / "x.safetensors", format=case.format, metadata=metadata)
    file = load_lora(path, modules=modules)
    assert (file.format, file.metadata.title) == (case.format, "matrix")
    assert_same(compute_target_deltas(file.weights), compute_target_deltas(lora))

    readers = find_programs(case.family, modules, load_file(path), lora)
    if (case.family, case.format) in REAL_WIDTH_ALONE:
        readers.add("diffusers")  # see test_diffusers_reads_fused_layers_at_real_width
    elif load_in_diffusers(case.family, modules, path, lora):
        readers.add("diffusers")
    assert set(list_readers(lora.layout, case.format, architecture)) == readers
    family = detect_family(lora.layout, architecture)
    assert has_written_keys(file.keys, file.weights, case.format, family)
    if resolve_format("auto", lora.layout, architecture) == case.format:
        has_linear = case.family == "SD 2.x" and case.preset == "attention+conv"
        known = {name for names in READERS[case.family].values() for name in names}
        lost = {"diffusers"} if has_linear else set()
        assert readers == known - lost or case.family == "Lumina 2"


def find_programs(
    family: str, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], lora: LoraWeights
) -> set[str]:
    """Programs other than diffusers that read every target of a file."""
    programs = set()
    if family in UNET_FAMILIES:
        stems = program_keys.list_comfyui_unet_stems(family, modules)
        if not program_keys.list_unread(stems, tensors):
            programs |= {"ComfyUI", "Forge"}
            assert_same_numbers(program_keys.compute_deltas(tensors), lora)
        if not program_keys.find_unread_kohya(family, modules, tensors):
            programs.add("kohya")
        if not program_keys.find_unread_a1111(family, modules, tensors):
            programs.add("A1111")
        return programs
    keys = comfyui_transformers.map_comfyui(family, modules["transformer"])
    keys |= program_keys.map_comfyui_text(modules)
    if not program_keys.list_unread(keys, tensors):
        programs |= {"ComfyUI", "Forge"} if family == "FLUX.1" else {"ComfyUI"}
        deltas = program_keys.compute_deltas(tensors)
        assert_same(
            add_rows(family, modules, keys, deltas), compute_original_deltas(family, modules, lora)
        )
    return programs


def add_rows(
    family: str,
    modules: Mapping[str, nn.Module],
    keys: Mapping[str, program_keys.Rows],
    deltas: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    heights = comfyui_transformers.compute_heights(family, modules["transformer"])
    return program_keys.add_rows(keys, deltas, heights)


def compute_original_deltas(
    family: str, modules: Mapping[str, nn.Module], lora: LoraWeights
) -> dict[str, Tensor]:
    """ΔW by layer of the original model."""
    rows = comfyui_transformers.map_layers(family, modules["transformer"])
    keys = {f"transformer.{path}": value for path, value in rows.items()}
    deltas = compute_target_deltas(lora)
    keys |= {name: program_keys.Rows(name, 0, -1) for name in deltas if name not in keys}
    return add_rows(family, modules, keys, deltas)


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, delta in expected.items():
        assert (actual[name] - delta).abs().max() <= 1e-5, name


def assert_same_numbers(deltas: Mapping[str, Tensor], lora: LoraWeights) -> None:
    """The ΔW of a file are those of the LoRA, whatever the names."""
    actual, expected = (
        sorted(float(delta.norm()) for delta in values.values())
        for values in (deltas, compute_target_deltas(lora))
    )
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected))


def load_in_diffusers(
    family: str, modules: Mapping[str, nn.Module], path: Path, lora: LoraWeights
) -> bool:
    """Load a file in diffusers; return whether it reads every target, and check ΔW if it does."""
    try:
        if family in UNET_FAMILIES:
            modules = unet_bases.load_lora(family, path)
        else:
            get_tiny_pipeline(TINY_NAMES[family]).pipe.load_lora_weights(path, adapter_name="m")
        deltas = {
            format_file_key(f"{component}.{name}"): compute_delta(layer)
            for component, module in modules.items()
            for name, layer in module.named_modules()
            if len(getattr(layer, "lora_A", {}))
        }
    except (KeyError, RuntimeError, ValueError):
        return False
    finally:
        if family not in UNET_FAMILIES:
            get_tiny_pipeline(TINY_NAMES[family]).pipe.unload_lora_weights()
    expected = compute_target_deltas(lora)
    if deltas.keys() < expected.keys():  # diffusers logs the keys that it leaves out
        return False
    assert_same(deltas, expected)
    return True


def compute_delta(layer: Any) -> Tensor:
    """ΔW [out, in] of a layer with one adapter."""
    (name,) = layer.lora_A
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    delta: Tensor = layer.scaling[name] * up.flatten(1) @ down.flatten(1)
    return delta.detach()


@pytest.mark.parametrize("preset", ["attention", "attention+mlp"])
def test_diffusers_reads_fused_layers_at_real_width(preset: str) -> None:
    from accelerate import init_empty_weights
    from diffusers import FluxPipeline, FluxTransformer2DModel

    with init_empty_weights():
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    layout = make_layout({"transformer": transformer}, preset, 1, "tiny/base")
    lora = LoraWeights.unflatten(layout, torch.randn(layout.numel))
    from hyperlora.lora.io.save import serialize_lora

    tensors = load(serialize_lora(lora, format="comfyui"))
    state_dict = FluxPipeline.lora_state_dict(tensors)
    pairs = {}
    for target, down, up in zip(layout.targets, lora.down, lora.up, strict=True):
        inputs = torch.randn(target.in_features)
        read_down = state_dict.pop(f"{target.name}.lora_A.weight")
        read_up = state_dict.pop(f"{target.name}.lora_B.weight")
        pairs[target.name] = (read_up @ (read_down @ inputs), up @ (down @ inputs))
    for name, (actual, expected) in pairs.items():
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4, msg=name)
    # the MLP that the preset leaves alone is part of a fused layer
    assert all(not tensor.any() for key, tensor in state_dict.items() if "lora_B" in key)
