"""One LoRA on the command line in every spelling gives one image: files, tags, weights, accents."""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights

STRATEGIES = ("merge", "switch", "composite")


def make_random_lora(layout: LoraLayout, seed: int) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights.unflatten(layout, torch.randn(layout.numel, generator=generator) / 4)


@pytest.fixture
def lora_dir(bundle: Any, tmp_path: Path) -> Path:
    """Two LoRAs of UNet and text encoder, the second also in the keys of kohya."""
    modules = load_diffusion_base(bundle.base).modules
    layout = make_layout(modules, "attention", 3, "tiny/base")
    for i, format in enumerate(("diffusers", "kohya")):
        save_lora(
            make_random_lora(layout, seed=i),
            tmp_path / "loras" / f"p{i}.safetensors",
            format=format,
        )
    return tmp_path / "loras"


@pytest.fixture
def render(run: Callable[..., Any], bundle: Any, tmp_path: Path, lora_dir: Path) -> Any:
    def render_image(prompt: str, *arguments: Any) -> np.ndarray:
        options = ("--steps", 3, "--guidance-scale", 3, "--seed", 4, "--lora-dir", lora_dir)
        output = tmp_path / "x.png"
        result = run(
            "render", "--prompt", prompt, "-o", output, "--base", bundle.base, *options, *arguments
        )
        assert result.code == 0, result
        return np.asarray(Image.open(output), int)

    return render_image


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_render_gives_one_image_for_all_spellings(
    render: Any, lora_dir: Path, strategy: str
) -> None:
    first, second = lora_dir / "p0.safetensors", lora_dir / "p1.safetensors"
    options = ("--strategy", strategy, "--switch-every", 1)
    images = [
        render("a portrait", "--lora", f"{first}:0.8", "--lora", f"{second}:-0.5", *options),
        render("a portrait <lora:p0:0.8><lora:p1:-0.5>", *options),
        render("<lyco:p0.safetensors:0.8> a portrait <lora:p1:te=-0.5:unet=-0.5>", *options),
        render("a portrait <lora:p1:-.5>", "--lora", f"{first}:.8", *options),
    ]
    plain = render("a portrait", *options)
    swapped = render("a portrait <lora:p0:-0.5><lora:p1:0.8>", *options)
    for image in images[1:]:
        assert np.array_equal(image, images[0])
    assert np.abs(images[0] - plain).max() > 3
    assert np.abs(images[0] - swapped).max() > 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_render_gives_one_image_for_keys_of_text_encoders(
    render: Any, bundle: Any, lora_dir: Path, strategy: str
) -> None:
    modules = {"text_encoder": load_diffusion_base(bundle.base).modules["text_encoder"]}
    lora = make_random_lora(make_layout(modules, "attention", 2, "tiny/base"), seed=7) * 3.0
    for format in ("diffusers", "kohya"):
        save_lora(lora, lora_dir / f"te-{format}.safetensors", format=format)
    options = ("--strategy", strategy, "--lora", lora_dir / "p0.safetensors")
    images = [
        image
        for name in ("te-diffusers", "te-kohya")
        for image in (
            render(f"a portrait <lora:{name}:0.7>", *options),
            render(f"a portrait <lora:{name}:0.7:0>", *options),
            render("a portrait", *options, "--lora", f"{lora_dir / name}.safetensors:0.7"),
        )
    ]
    # the tag comes after the file in each
    for image in images[1:]:
        assert np.array_equal(image, images[0])
    assert np.abs(images[0] - render("a portrait", *options)).max() > 3


@pytest.mark.parametrize(("stored", "typed"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_commands_find_lora_files_by_equal_letters(
    run: Callable[..., Any], render: Any, lora_dir: Path, tmp_path: Path, stored: str, typed: str
) -> None:
    def make_name(form: str) -> str:
        return unicodedata.normalize(form, "Zoë à Köln")

    folder = tmp_path / unicodedata.normalize(stored, "été")
    folder.mkdir()
    weights = load_lora(lora_dir / "p0.safetensors").weights
    metadata = LoraMetadata(recommended_strength=0.6)
    save_lora(weights, folder / f"{make_name(stored)}.safetensors", metadata=metadata)
    path = tmp_path / unicodedata.normalize(typed, "été") / f"{make_name(typed)}.safetensors"
    assert not path.exists()

    image = render("a portrait <lora:p0:0.6>")
    assert np.array_equal(render("a portrait", "--lora", f"{path}:0.6"), image)
    assert np.array_equal(render("a portrait", "--lora", path), image)  # its own strength
    tag = f"a portrait <lora:{make_name(typed)}:0.6>"
    assert np.array_equal(render(tag, "--lora-dir", path.parent), image)

    for command in (
        ("inspect", path),
        ("convert", path, "-o", tmp_path / "c.safetensors"),
        ("combine", f"{path}:2", path, "-o", tmp_path / "d.safetensors"),
        ("scale", path, "--factor", 2, "-o", tmp_path / "e.safetensors"),
    ):
        result = run(*command)
        assert result.code == 0, result
    result = run("inspect", path.with_name("é.safetensors"))
    assert (result.code, "there is no file" in result.err) == (2, True)


@pytest.mark.parametrize("num_megabytes", [17, 40])
def test_convert_keeps_large_headers(
    run: Callable[..., Any], lora_dir: Path, tmp_path: Path, num_megabytes: int
) -> None:
    tags = "x" * (num_megabytes << 20)
    path = tmp_path / "large.safetensors"
    save_file(load_file(lora_dir / "p1.safetensors"), path, {"ss_tag_frequency": tags})
    output = tmp_path / "converted.safetensors"
    result = run("convert", path, "-o", output, "--format", "diffusers")
    assert result.code == 0, result
    file = load_lora(output)
    assert file.metadata.extra["ss_tag_frequency"] == tags
    assert file.format == "diffusers"
