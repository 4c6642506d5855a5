"""``hyperlora edit`` with LoRWeB, on a tiny FLUX.1 Kontext."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyperlora.lora.io.load import load_lora
from hyperlora.models.i2l import compute_shape_digest, make_z_image_config
from hyperlora.pipelines.released import lorweb, recognize
from hyperlora.pipelines.released.cards import find_card
from hyperlora.pipelines.released.lorweb import LorwebModel
from tests.pipelines.released.tiny_networks import (
    CLIP_CONFIG,
    make_photo,
    save_clip,
    save_i2l,
    save_lorweb,
)
from tests.tiny_pipelines import get_tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, the base, the network and its encoder."""
    folder = tmp_path_factory.mktemp("lorweb-cli")
    pipe = get_tiny_pipeline("flux_kontext").pipe
    pipe.save_pretrained(folder / "kontext")
    linears = {
        path: (layer.in_features, layer.out_features)
        for path, layer in pipe.transformer.named_modules()
        if isinstance(layer, torch.nn.Linear) and "transformer_blocks." in path
    }
    save_lorweb(linears, folder / "network" / "lorweb_model" / "lorweb_model.safetensors")
    save_clip(folder / "clip")
    for i, name in enumerate(("before", "after", "source", "other")):
        make_photo(i, 48, 48).save(folder / f"{name}.png")
    return folder


@pytest.fixture(autouse=True)
def tiny_clip(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(lorweb, "make_clip_config", lambda: CLIP_CONFIG)
    monkeypatch.setattr(lorweb, "CLIP_ID", str(folder / "clip"))


def edit(run: Any, folder: Path, *arguments: Any, images: Any = ("source",), pair: Any = ()) -> Any:
    names = pair or ("before", "after")
    return run(
        "edit",
        *(folder / f"{name}.png" for name in names),
        *(part for name in images for part in ("--images", folder / f"{name}.png")),
        "--model",
        folder / "network",
        *arguments,
    )


def open_model(folder: Path) -> LorwebModel:
    return LorwebModel(
        find_card("lorweb"),
        folder / "network" / "lorweb_model" / "lorweb_model.safetensors",
        folder / "clip" / "model.safetensors",
        clip_config=CLIP_CONFIG,
    )


@pytest.mark.parametrize(
    ("options", "order", "factor"),
    [
        ((), ("before", "after"), 1),
        (("--strength", -2), ("after", "before"), 2),
        (("--reverse",), ("after", "before"), 1),
        (("--reverse", "--strength", -1), ("before", "after"), 1),
    ],
)
def test_edit_writes_the_lora_of_one_image(
    run: Any, folder: Path, tmp_path: Path, options: Any, order: Any, factor: float
) -> None:
    output = tmp_path / "edit.safetensors"
    result = edit(run, folder, "-o", output, "--images-dir", tmp_path / "edited", *options)
    assert result.code == 0, result
    model = open_model(folder)
    expected = model(*(folder / f"{name}.png" for name in (*order, "source"))).weights * factor
    weights = load_lora(output, model.layout).weights
    torch.testing.assert_close(weights.flatten(), expected.flatten(), rtol=2e-3, atol=1e-4)
    assert "rank 6" in result.out and "non-commercial use only" in result.err
    assert not (tmp_path / "edited").exists(), "no base is loaded for a file"


def test_edit_draws_every_image_with_its_own_lora(run: Any, folder: Path, tmp_path: Path) -> None:
    arguments = ("--base", folder / "kontext", "--steps", 2, "--seed", 3)
    images = {}
    for name, options in {"edited": (), "weak": ("--strength", 0.001)}.items():
        result = edit(
            run,
            folder,
            *(*arguments, *options, "--images-dir", tmp_path / name),
            images=("source", "other"),
        )
        assert result.code == 0, result
        paths = sorted((tmp_path / name).iterdir())
        assert [path.name for path in paths] == ["other.png", "source.png"]
        images[name] = [np.asarray(Image.open(path), int) for path in paths]
    for edited, weak in zip(images["edited"], images["weak"], strict=True):
        assert np.abs(edited - weak).max() > 0


@pytest.mark.parametrize(
    ("options", "images", "sentence"),
    [
        (("-o", "x.safetensors"), (), "for one image: name the image with --images"),
        (("-o", "x.safetensors"), ("source", "other"), "2 given: give one with -o"),
        (
            ("-o", "x.safetensors", "--pair", "before.png", "after.png"),
            ("source",),
            "the LoRA of one pair, 2 given",
        ),
        (
            ("-o", "x.safetensors", "--candidate-prompt", "a"),
            ("source",),
            "searches no instructions",
        ),
    ],
)
def test_wrong_numbers_are_one_sentence(
    run: Any,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: Any,
    images: Any,
    sentence: str,
) -> None:
    for name in ("before.png", "after.png"):
        shutil.copy(folder / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    # before weights are opened or fetched
    monkeypatch.setattr(lorweb, "CLIP_ID", str(tmp_path / "absent"))
    result = edit(run, folder, *options, images=images)
    assert result.code == 2
    (error,) = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert sentence in error
    assert not (tmp_path / "x.safetensors").exists()


def test_networks_of_photos_are_refused(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_z_image_config(8, 16, 1, 1, 2)
    save_i2l(config, tmp_path / "i2l" / "model.safetensors")
    digest = compute_shape_digest(config.tensor_shapes)[:8]
    monkeypatch.setitem(recognize.I2L_DIGESTS, digest, "z-image")
    result = run(
        "edit",
        *(folder / "before.png", folder / "after.png"),
        *("--model", tmp_path / "i2l", "-o", tmp_path / "x.safetensors"),
    )
    assert result.code == 2 and "makes LoRAs of photos" in " ".join(result.err.split())
