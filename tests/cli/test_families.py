"""Every command on every family of bases: each works, or is refused in one sentence.

The table of the bases guide is made of this one: a cell is a test.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.families.registry import FAMILIES
from hyperlora.lora.io.load import load_lora
from tests.tiny_pipelines import FACTORIES, FAST, mark_heavy

NAMES = [name for name in FACTORIES if not name.endswith(("_edit", "_distilled", "_turbo"))] + [
    "qwen_image_edit"
]
EDITING = (
    "instruct_pix2pix",
    "instruct_pix2pix_xl",
    "flux_kontext",
    "flux2",
    "flux2_klein",
    "qwen_image_edit",
    "qwen_image_edit_plus",
)
NOT_GENERATING = (
    "instruct_pix2pix",
    "instruct_pix2pix_xl",
    "qwen_image_edit",
    "qwen_image_edit_plus",
)
WITHOUT_REGIONS = ("krea_2", "qwen_image_21")
RunCommand = Callable[..., Any]
BACKBONE = {"img_size": 16, "depth": 1, "embed_dim": 8, "num_heads": 2, "patch_size": 8}


@dataclass(frozen=True)
class FamilyFiles:
    """Folders of one family: a base, a model from photos, a photo, and two LoRA files."""

    name: str
    base: Path
    model: Path
    photo: Path
    loras: tuple[Path, Path]


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every family take small images where a command asks for the size of the base."""
    for family in FAMILIES.values():
        monkeypatch.setattr(family, "resolution", property(lambda self: 64))


@pytest.fixture(scope="module", params=mark_heavy(NAMES, (*FAST, "qwen_image_edit")))
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyFiles:
    from hyperlora.encoders.timm_encoder import TimmEncoder
    from hyperlora.models.hypernetwork import Hypernetwork
    from hyperlora.pipelines.image_to_lora import ImageToLora
    from hyperlora.pipelines.model_card import ModelCard

    name = request.param
    folder = tmp_path_factory.mktemp(name)
    FACTORIES[name]().pipe.save_pretrained(folder / "base")
    base = load_diffusion_base(folder / "base")
    photo = folder / "me.png"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    torch.manual_seed(4)
    encoder = TimmEncoder("vit_tiny_patch16_224", image_size=16, options=BACKBONE)
    sizes: Any = {"width": 16, "depth": 1, "num_heads": 2, "head_options": {"size": 4}}
    network = Hypernetwork(base.make_layout("attention", 2), encoder.width, head="basis", **sizes)
    torch.nn.init.normal_(network.code_proj, std=0.3)
    card = ModelCard(trigger_phrase="sks person", resolution=32, architecture=base.architecture)
    model = ImageToLora(encoder, network, card)
    model.save_pretrained(folder / "model")
    loras = [model(image) for image in (photo, Image.new("RGB", (64, 64), "red"))]
    paths = [lora.save(folder / f"{i}.safetensors") for i, lora in enumerate(loras)]
    return FamilyFiles(name, folder / "base", folder / "model", photo, (paths[0], paths[1]))


def render(run: RunCommand, files: FamilyFiles, output: Path, *options: Any) -> Any:
    return run(
        "render",
        *("--base", files.base, "-o", output, "--steps", 2, "--width", 32, "--height", 32),
        *("--prompt", "sks person", *options),
    )


def read_pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), int)


def test_render_with_each_strategy(run: RunCommand, files: FamilyFiles, tmp_path: Path) -> None:
    output = tmp_path / "image.png"
    if files.name in NOT_GENERATING:
        result = render(run, files, output)
        assert result.code == 2 and not output.exists(), result
        assert "edits images and generates none from a prompt alone" in result.err
        return
    a, b = files.loras
    assert render(run, files, output).code == 0
    plain = read_pixels(output)
    variants: dict[str, list[Any]] = {
        "merge": ["--lora", f"{a}:0.8", "--lora", b],
        "switch": ["--lora", a, "--lora", b, "--strategy", "switch", "--switch-every", 1],
        "composite": ["--lora", a, "--lora", b, "--strategy", "composite"],
        "gamma": ["--lora", a, "--gamma", 1.5],
        "spatial": [
            *("--lora", a, "--region", "0,0,0.5,1", "--lora", b, "--region", "0.5,0,1,1"),
            *("--strategy", "spatial"),
        ],
    }
    for name, options in variants.items():
        output.unlink()
        result = render(run, files, output, *options)
        if name == "spatial" and files.name in WITHOUT_REGIONS:
            assert result.code == 2 and "regions are not supported" in result.err, result
            assert not output.exists()
            Image.fromarray(plain.astype(np.uint8)).save(output)
            continue
        assert result.code == 0, (name, result)
        assert np.abs(read_pixels(output) - plain).max() > 0, name


def test_generate_and_refine(run: RunCommand, files: FamilyFiles, tmp_path: Path) -> None:
    output = tmp_path / "me.safetensors"
    options = ["generate", files.photo, "--model", files.model, "--base", files.base, "-o", output]
    assert run(*options).code == 0
    base = load_diffusion_base(files.base)
    plain = load_lora(output, modules=base.modules)
    assert plain.weights.layout.targets == base.make_layout("attention", 2).targets
    assert plain.metadata.architecture == base.architecture
    result = run(*options, "--refine-steps", 2, "--refine-method", "photos")
    if base.family.edits_images and files.name in NOT_GENERATING:
        assert result.code == 2 and "edits images" in result.err, result
        return
    assert result.code == 0, result
    refined = load_lora(output, modules=base.modules)
    assert refined.weights.layout.rank > plain.weights.layout.rank
    assert (refined.weights - plain.weights).compute_delta_norms().max() > 1e-6


def test_edit_with_a_pair(run: RunCommand, files: FamilyFiles, tmp_path: Path) -> None:
    from hyperlora.encoders.timm_encoder import TimmEncoder
    from hyperlora.models.pair_hypernetwork import PairHypernetwork
    from hyperlora.pipelines.model_card import ModelCard
    from hyperlora.pipelines.pair_to_lora import PairToLora

    base = load_diffusion_base(files.base)
    encoder = TimmEncoder("vit_tiny_patch16_224", image_size=16, options=BACKBONE)
    sizes: Any = {"width": 16, "depth": 1, "num_heads": 2, "head_options": {"size": 4}}
    layout = base.make_layout("attention", 2)
    network = PairHypernetwork(layout, encoder.width, antisymmetric=True, head="basis", **sizes)
    torch.nn.init.normal_(network.hypernetwork.code_proj, std=0.3)
    model = tmp_path / "model"
    PairToLora(encoder, network, ModelCard(resolution=64)).save_pretrained(model)
    before, after = files.photo, tmp_path / "after.png"
    Image.fromarray(255 - read_pixels(files.photo).astype(np.uint8)).save(after)
    edited = tmp_path / "edited"
    result = run(
        *("edit", before, after, "--model", model, "--base", files.base, "--images", before),
        *("--images-dir", edited, "--steps", 2, "-o", tmp_path / "edit.safetensors"),
    )
    if files.name not in EDITING:
        assert result.code == 2 and "one that edits images was expected" in result.err, result
        assert not edited.exists()
        return
    assert result.code == 0, result
    assert len(list(edited.glob("*.png"))) == 1
    saved = load_lora(tmp_path / "edit.safetensors", modules=base.modules)
    assert saved.weights.layout.targets == layout.targets


def test_inspect_against_the_base(run: RunCommand, files: FamilyFiles) -> None:
    result = run("inspect", files.loras[0], "--base", files.base)
    assert (result.code == 0 and "transformer" in result.out) or "unet" in result.out, result


def test_lora_of_another_family_is_named(
    run: RunCommand, files: FamilyFiles, bundle: Any, tmp_path: Path
) -> None:
    output = tmp_path / "image.png"
    other_base = FamilyFiles(files.name, bundle.base, files.model, files.photo, files.loras)
    result = render(run, other_base, output, "--lora", files.loras[0])
    if result.code == 0:  # another UNet of the same shapes
        assert "was made for" in result.err
        return
    assert result.code == 2 and "error: " in result.err and not output.exists(), result
    result = run(
        *("generate", files.photo, "--model", files.model, "--base", bundle.base),
        *("-o", tmp_path / "me.safetensors", "--refine-steps", 1, "--refine-method", "photos"),
    )
    assert result.code == 2 and not (tmp_path / "me.safetensors").exists(), result
