"""LoRWeB from three images to a file and an edited image, on a tiny FLUX.1 Kontext."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.pipelines.released.cards import find_card
from hyperlora.pipelines.released.hub_files import open_files
from hyperlora.pipelines.released.lorweb import LorwebModel, cut_sheet, edit_sheet, make_sheet
from hyperlora.pipelines.released.recognize import recognize
from hyperlora.pipelines.released.released_model import ReleasedOptions
from tests.pipelines.released.tiny_networks import (
    CLIP_CONFIG,
    make_clip,
    make_photo,
    save_clip,
    save_lorweb,
)
from tests.tiny_pipelines import get_tiny_pipeline

PHOTOS = (make_photo(0), make_photo(1, 30, 64), make_photo(2, 64, 32))


def list_linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    return {
        path: layer
        for path, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and "transformer_blocks." in path
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lorweb")
    linears = list_linears(get_tiny_pipeline("flux_kontext").denoiser)
    save_lorweb(
        {path: (layer.in_features, layer.out_features) for path, layer in linears.items()},
        folder / "network" / "lorweb_model" / "lorweb_model.safetensors",
    )
    save_clip(folder / "clip")
    return folder


def open_model(folder: Path) -> LorwebModel:
    return LorwebModel(
        find_card("lorweb"),
        folder / "network" / "lorweb_model" / "lorweb_model.safetensors",
        folder / "clip" / "model.safetensors",
        clip_config=CLIP_CONFIG,
    )


def embed_whole(photos: Any) -> Tensor:
    """Projected embeddings by transformers' class and its PIL processor, [3, projection]."""
    size = photos[0].size
    images = [photo.resize(size, Image.Resampling.BICUBIC) for photo in photos]
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return make_clip()(pixels).image_embeds


@contextmanager
def mix_layers(transformer: nn.Module, tensors: dict[str, Tensor], query: Tensor) -> Iterator[None]:
    """Add Σ e_n (x A_n) B_n to the output of every layer, as the specification says."""
    handles = []
    for path, layer in list_linears(transformer).items():
        a, b, keys, to_q = (
            tensors[f"transformer.{path}.{tail}"]
            for tail in ("lora_A", "lora_B", "lora_keys", "lora_to_q.weight")
        )
        weights = torch.softmax((to_q @ query) @ keys.T / keys.shape[1] ** 0.5, 0)

        def add(
            module: nn.Module, args: Any, output: Tensor, a: Any = a, b: Any = b, w: Any = weights
        ) -> Tensor:
            return output + sum(w[n] * (args[0] @ a[n]) @ b[n] for n in range(len(w)))

        handles.append(layer.register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_kontext(tiny: Any) -> Tensor:
    """Latents of two steps."""
    with torch.no_grad():
        return tiny.pipe(
            prompt=list(tiny.prompts),
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
            **tiny.arguments,
        ).images


def test_exported_lora_equals_the_mixed_layers(folder: Path, tmp_path: Path) -> None:
    tiny = get_tiny_pipeline("flux_kontext")
    lora = open_model(folder)(*PHOTOS)
    path = lora.save(tmp_path / "edit.safetensors")
    tensors = load_file(folder / "network" / "lorweb_model" / "lorweb_model.safetensors")
    unedited = run_kontext(tiny)
    with mix_layers(tiny.denoiser, tensors, embed_whole(PHOTOS).flatten()):
        expected = run_kontext(tiny)
    tiny.pipe.load_lora_weights(path, adapter_name="edit")
    try:
        output = run_kontext(tiny)
    finally:
        tiny.pipe.unload_lora_weights()
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert (expected - unedited).abs().max() > 0.01


def test_every_image_changes_the_lora(folder: Path) -> None:
    model = open_model(folder)
    lora = model(*PHOTOS).weights
    for i in range(3):
        photos = [*PHOTOS[:i], make_photo(9, *PHOTOS[i].size), *PHOTOS[i + 1 :]]
        assert (model(*photos).weights.flatten() - lora.flatten()).abs().max() > 1e-4


def test_rank_is_reduced_by_svd(folder: Path) -> None:
    model = open_model(folder)
    exact = model(*PHOTOS).weights
    assert exact.layout == model.layout and exact.layout.rank == 6
    small = model(*PHOTOS, rank=2).weights
    for delta, expected in zip(
        small.get_delta_weights(), exact.resize(2).get_delta_weights(), strict=True
    ):
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)
    assert model(*PHOTOS, rank=6).weights.layout.rank == 6
    for rank in (0, 7):
        with pytest.raises(InvalidArgumentError, match="a rank from 1 to 6"):
            model(*PHOTOS, rank=rank)


def test_sheet_is_two_by_two_at_the_size_of_the_first_image() -> None:
    sheet = make_sheet(*PHOTOS)
    assert sheet.size == (100, 80)
    quadrants = cut_sheet(sheet)
    for quadrant, photo in zip(quadrants, (*PHOTOS, PHOTOS[2]), strict=True):
        expected = photo.resize((50, 40), Image.Resampling.BICUBIC)
        assert np.array_equal(quadrant, expected)


def test_edit_sheet_returns_the_lower_right_quadrant(folder: Path) -> None:
    base = DiffusionBase("tiny/kontext", get_tiny_pipeline("flux_kontext").pipe)
    sheet = make_sheet(*PHOTOS)
    lora = open_model(folder).generate(sheet)
    images = [edit_sheet(base, sheet, w, seed=0, num_inference_steps=2) for w in (lora, lora * 0)]
    side = base.resolution
    width, height = images[0].size
    assert width % 16 == height % 16 == 0 and width > height  # half of a sheet of 100 x 80
    assert 0.4 < width * height / side**2 * 2 < 2
    assert np.abs(np.asarray(images[0], int) - np.asarray(images[1], int)).max() > 0


def test_header_names_the_licenses(folder: Path, tmp_path: Path) -> None:
    path = open_model(folder)(*PHOTOS).save(tmp_path / "edit.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert "NVIDIA" in metadata["modelspec.license"]
    assert "clip-vit-large" in metadata["hyperlora.encoder"]
    assert metadata["hyperlora.commercial_use"] == "no"
    assert metadata["hyperlora.base"] == "black-forest-labs/FLUX.1-Kontext-dev"


def open_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> LorwebModel:
    monkeypatch.setattr("hyperlora.pipelines.released.lorweb.make_clip_config", lambda: CLIP_CONFIG)
    files = open_files(str(folder / "network"))
    options = ReleasedOptions(encoder=str(folder / "clip"))
    return LorwebModel.from_files(files, recognize(files), options)


def test_folders_are_recognized(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_folder(folder, monkeypatch)
    assert model.facts.kind == "lorweb" and model.layout.rank == 6


@pytest.mark.parametrize("part", ["network/lorweb_model/lorweb_model", "clip/model"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_bad_files_are_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, damage: str
) -> None:
    shutil.copytree(folder, tmp_path / "lorweb")
    path = tmp_path / "lorweb" / f"{part}.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    else:
        path.unlink()
    with pytest.raises(ModelLoadError, match=r"cut off|not whole|lacks model|holds no network"):
        open_folder(tmp_path / "lorweb", monkeypatch)
