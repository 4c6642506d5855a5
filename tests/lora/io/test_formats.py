"""What a LoRA is written as, who is lost by another choice, and files at real size."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file
from torch import nn

from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.formats import (
    FORMAT_CHOICES,
    READERS,
    describe_lost_readers,
    detect_family,
    list_readers,
    resolve_format,
)
from hyperlora.lora.io.keys import convert_path_to_sgm
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora, serialize_lora
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from tests.diffusion.families import test_target_patterns
from tests.lora.io import comfyui_transformers, program_keys, unet_bases
from tests.lora.io.test_readers_matrix import compute_delta, get_architecture, get_modules

REAL_FAMILIES = {
    "SD 1.5": "SD 1.x",
    "SDXL": "SDXL",
    "SD 3 medium": "SD3",
    "SD 3.5 medium": "SD3",
    "FLUX.1": "FLUX.1",
    "FLUX.2 klein 4B": "FLUX.2",
    "Qwen-Image": "Qwen-Image",
    "Z-Image": "Z-Image",
    "Lumina 2": "Lumina 2",
}
REAL_FAST = ("SD 1.5", "Z-Image", "Lumina 2", "SD 3.5 medium")


def make_random_lora(layout: LoraLayout, seed: int = 0) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights.unflatten(layout, torch.randn(layout.numel, generator=generator))


def list_stems(data: bytes) -> set[str]:
    return set(program_keys.find_downs(load(data)))


@pytest.mark.parametrize(
    ("name", "architecture", "expected"),
    [
        ("SD 1.5", "", "kohya"),
        ("SDXL", "", "sgm"),
        ("SDXL", "stable-diffusion-xl-v1-base", "sgm"),
        ("FLUX.1", "", "diffusers"),
        ("Qwen-Image", "", "diffusers"),
    ],
)
def test_resolve_format_of_auto_is_by_family(name: str, architecture: str, expected: str) -> None:
    base = test_target_patterns.BASES[name]
    component = "unet" if name.startswith("SD") else "transformer"
    denoiser = test_target_patterns.make_denoiser(base)
    for preset in ("attention", "attention+mlp"):
        layout = make_layout({component: denoiser}, preset, 1, "x")
        assert detect_family(layout, architecture) == REAL_FAMILIES[name]
        assert resolve_format("auto", layout, architecture) == expected


@pytest.mark.parametrize(
    ("family", "format", "message"),
    [
        ("SD 1.x", "sgm", "sgm names are those of SDXL, and this LoRA is for SD 1.x: use format k"),
        ("SD 2.x", "sgm", "this LoRA is for SD 2.x"),
        ("SD3", "sgm", "this LoRA is for SD3: use format diffusers"),
        ("SD 1.x", "comfyui", "comfyui names are for transformers, and this LoRA is for SD 1.x"),
        ("Z-Image", "kohya", "use another format"),
        ("Z-Image", "onnx", f"unknown LoRA format 'onnx'; known: {', '.join(FORMAT_CHOICES)}"),
    ],
)
def test_save_lora_refuses_formats_without_names_for_the_base(
    family: str, format: Any, message: str, tmp_path: Path
) -> None:
    modules = get_modules(family)
    layout = make_layout(dict([next(iter(modules.items()))]), "attention", 2, "x")
    lora = make_random_lora(layout)
    metadata = LoraMetadata(architecture=get_architecture(family))
    path = tmp_path / "x.safetensors"
    with pytest.raises(InvalidArgumentError, match=re.escape(message)):
        save_lora(lora, path, format=format, metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_convert_path_to_sgm_covers_every_sdxl_module() -> None:
    paths = [path for path, _ in program_keys.list_layers(get_modules("SDXL")["unet"])]
    sgm_paths = {path: convert_path_to_sgm(path) for path in paths}
    assert sgm_paths == {path: program_keys.make_ldm_path(path, "SDXL") for path in paths}
    assert len(set(sgm_paths.values())) == len(paths)


@pytest.mark.parametrize("format", ["kohya", "sgm"])
def test_sdxl_without_architecture_numbers_its_text_encoder(format: Any) -> None:
    modules = get_modules("SDXL")
    modules = {name: modules[name] for name in ("unet", "text_encoder")}
    layout = make_layout(modules, "attention", 2, "x")
    stems = list_stems(serialize_lora(make_random_lora(layout), format=format))
    text_stems = {stem for stem in stems if stem.startswith("lora_te")}
    assert text_stems and all(stem.startswith("lora_te1_") for stem in text_stems)


@pytest.mark.parametrize(
    ("family", "format"), [("SD 1.x", "kohya"), ("SDXL", "kohya"), ("SDXL", "sgm")]
)
def test_diffusers_reads_every_layer_of_a_unet(family: str, format: Any, tmp_path: Path) -> None:
    unet = get_modules(family)["unet"]
    layout = LoraLayout.from_module(unet, "unet", lambda _: True, 2, "x")
    lora = make_random_lora(layout)
    metadata = LoraMetadata(architecture=unet_bases.ARCHITECTURES[family])
    path = save_lora(lora, tmp_path / "x.safetensors", format=format, metadata=metadata)
    layers = dict(unet_bases.load_lora(family, path)["unet"].named_modules())
    for target, down, up in zip(layout.targets, lora.down, lora.up, strict=True):
        torch.testing.assert_close(compute_delta(layers[target.path]), up @ down)


def test_linear_projections_of_sd_2_are_convolutions_for_kohya_alone(tmp_path: Path) -> None:
    modules = {"unet": get_modules("SD 2.x")["unet"]}
    lora = make_random_lora(make_layout(modules, "attention+conv", 2, "x"))
    for format, ndim in (("kohya", 4), ("diffusers", 2)):
        path = save_lora(lora, tmp_path / f"{format}.safetensors", format=format)
        downs = program_keys.find_downs(load_file(path))
        projections = {
            down.ndim for stem, down in downs.items() if re.search(r"attentions.\d.proj_", stem)
        }
        assert projections == {ndim}
        read = load_lora(path, modules=modules).weights
        assert torch.equal(read.flatten(), lora.flatten())


def test_describe_lost_readers_names_programs_and_a_better_format() -> None:
    unet = make_layout({"unet": get_modules("SD 1.x")["unet"]}, "attention", 2, "x")
    sentence = describe_lost_readers(unet, "diffusers")
    assert all(program in sentence for program in ("A1111", "kohya", "Forge", "ComfyUI", "auto"))
    assert not describe_lost_readers(unet, "kohya")
    lumina = make_layout(
        {"transformer": get_modules("Lumina 2")["transformer"]}, "attention", 2, "x"
    )
    assert describe_lost_readers(lumina, "diffusers") == (
        "ComfyUI cannot read every key of a Lumina 2 LoRA in format diffusers: use format comfyui "
        "for it"
    )
    z_image = make_layout(
        {"transformer": get_modules("Z-Image")["transformer"]}, "attention", 2, "x"
    )
    assert not describe_lost_readers(z_image, "diffusers")


@pytest.mark.parametrize("part", ["to_q", "to_v", "proj_mlp"])
def test_comfyui_pads_parts_that_a_lora_leaves_alone(part: str) -> None:
    modules = {"transformer": get_modules("FLUX.1")["transformer"]}
    layout = LoraLayout.from_module(
        modules["transformer"], "transformer", lambda path: path.endswith(part), 2, "x"
    )
    lora = make_random_lora(layout)
    data = serialize_lora(lora, format="comfyui", metadata=LoraMetadata(architecture="flux-1-dev"))
    keys = comfyui_transformers.map_comfyui("FLUX.1", modules["transformer"])
    heights = comfyui_transformers.compute_heights("FLUX.1", modules["transformer"])
    layers = program_keys.add_rows(keys, program_keys.compute_deltas(load(data)), heights)
    rows = comfyui_transformers.map_layers("FLUX.1", modules["transformer"])
    for target, down, up in zip(layout.targets, lora.down, lora.up, strict=True):
        layer, start, count = rows[target.path]
        torch.testing.assert_close(layers[layer][start : start + count], up @ down)
        assert not layers[layer][:start].any() and not layers[layer][start + count :].any()


def test_comfyui_takes_a_lora_that_changes_nothing() -> None:
    modules = {"transformer": get_modules("Lumina 2")["transformer"]}
    lora = LoraWeights.zeros(make_layout(modules, "attention+mlp", 2, "x"))
    read = load_lora(serialize_lora(lora, format="comfyui"), modules=modules).weights
    assert [t.name for t in read.layout.targets] == [t.name for t in lora.layout.targets]
    assert not read.compute_delta_norms().any()


def mark_real(names: Any) -> list[Any]:
    return [n if n in REAL_FAST else pytest.param(n, marks=pytest.mark.heavy) for n in names]


@pytest.mark.parametrize("name", mark_real(REAL_FAMILIES))
def test_files_at_real_size_are_read_whole(name: str) -> None:
    base, family = test_target_patterns.BASES[name], REAL_FAMILIES[name]
    component = "transformer" if family not in unet_bases.ARCHITECTURES else "unet"
    modules: dict[str, nn.Module] = {component: test_target_patterns.make_denoiser(base)}
    layout = make_layout(modules, "attention+mlp", 1, "x")
    assert len(layout.targets) == base.num_attention + base.num_feed_forward
    lora = make_random_lora(layout) * 1e-2
    for format in READERS[family]:
        tensors = load(serialize_lora(lora, format=format, dtype=torch.float16))
        readers = list_readers(layout, format)
        if component == "unet":
            unread = {
                "kohya": program_keys.find_unread_kohya(family, modules, tensors),
                "A1111": program_keys.find_unread_a1111(family, modules, tensors),
                "ComfyUI": program_keys.list_unread(
                    program_keys.list_comfyui_unet_stems(family, modules), tensors
                ),
            }
        else:
            keys = comfyui_transformers.map_comfyui(family, modules["transformer"])
            unread = {"ComfyUI": program_keys.list_unread(keys, tensors)}
        for program, stems in unread.items():
            assert (program in readers) == (not stems), (format, program, len(stems))


@settings(max_examples=6)
@given(st.integers(0, 2**20), st.sampled_from([1, 3]), st.sampled_from(["SD 1.x", "Z-Image"]))
def test_conversion_between_formats_keeps_numbers(
    tmp_path_factory: Any, seed: int, rank: int, family: str
) -> None:
    modules = dict([next(iter(get_modules(family).items()))])
    lora = make_random_lora(make_layout(modules, "attention+mlp", rank, "x"), seed)
    folder, current = tmp_path_factory.mktemp("trip"), lora
    for format in (*READERS[family], "auto", *READERS[family]):
        path = save_lora(current, folder / f"{format}.safetensors", format=format)
        current = load_lora(path, modules=modules).weights
    assert torch.equal(current.flatten(), lora.flatten())


def test_guide_has_the_table_of_readers() -> None:
    guide = Path(__file__).parents[3] / "docs/guides/lora-files.md"
    rows = {
        tuple(cell.strip().strip("`") for cell in line.strip("|\n ").split("|"))
        for line in guide.read_text(encoding="utf-8").splitlines()
    }
    for family, formats in READERS.items():
        for format, programs in formats.items():
            assert (family, format, ", ".join(programs)) in rows
