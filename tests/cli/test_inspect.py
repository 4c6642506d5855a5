"""``hyperlora inspect``: what a LoRA file is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.pipelines.image_to_lora import ImageToLora

RunCommand = Callable[..., Any]


@pytest.fixture
def lora_paths(bundle: Any, tmp_path: Path) -> list[Path]:
    model = ImageToLora.from_pretrained(str(bundle.model))
    return [
        replace(
            model(bundle.subjects / f"person-{i}" / "0.png"), metadata=LoraMetadata(title=f"p{i}")
        ).save(tmp_path / f"p{i}.safetensors", format=format)
        for i, format in enumerate(("diffusers", "kohya"))
    ]


def test_inspect_shows_file(run: RunCommand, bundle: Any, lora_paths: list[Path]) -> None:
    for path, format in zip(lora_paths, ("diffusers", "kohya"), strict=True):
        result = run("inspect", path)
        assert result.code == 0
        for report in (path.name, format, f"{bundle.base.parent.name}/base", "metadata title"):
            assert report in result.out
        info = json.loads(run("inspect", path, "--base", bundle.base, "--json").out)
        assert (info["format"], info["compatible_base"], info["rank_counts"]) == (
            format,
            str(bundle.base),
            {"2": info["num_targets"]},
        )
        assert info["norm"] > 0
        assert "compatible_base" not in json.loads(run("inspect", path, "--json").out)


SPELLINGS = {
    "base_model.model.": lambda key: key.replace("unet.", "base_model.model."),
    "processor": lambda key: key.replace(".to_q.lora_A", ".processor.to_q_lora.down").replace(
        ".to_q.lora_B", ".processor.to_q_lora.up"
    ),
    "lycoris_": lambda key: (
        "lycoris_"
        + key.removeprefix("unet.").split(".lora_")[0].replace(".", "_")
        + (".lora_down.weight" if "lora_A" in key else ".lora_up.weight")
    ),
    "no component": lambda key: key.removeprefix("unet."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_inspect_names_no_readers_of_other_spellings(
    run: RunCommand, tmp_path: Path, spelling: str
) -> None:
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{stem}.lora_A.weight": torch.randn(2, 320),
        f"{stem}.lora_B.weight": torch.randn(320, 2),
    }
    metadata = {"modelspec.architecture": "stable-diffusion-v1/lora"}
    plain, other = tmp_path / "plain.safetensors", tmp_path / "other.safetensors"
    save_file(tensors, plain, metadata)
    save_file({SPELLINGS[spelling](key): t for key, t in tensors.items()}, other, metadata)
    assert json.loads(run("inspect", plain, "--json").out)["readers"] == ["diffusers"]
    info = json.loads(run("inspect", other, "--json").out)
    assert info["readers"] == []
    assert any("hyperlora convert writes keys" in note for note in info["notes"])
    converted = tmp_path / "converted.safetensors"
    assert run("convert", other, "-o", converted, "--format", "kohya").code == 0
    info = json.loads(run("inspect", converted, "--json").out)
    assert len(info["readers"]) == 5 and info["notes"] == []


def test_inspect_escapes_metadata(run: RunCommand, lora_paths: list[Path]) -> None:
    unsafe_metadata = {"modelspec.title": "[/b] [red]x \x1b[31m"}
    save_file(load_file(lora_paths[0]), lora_paths[0], metadata=unsafe_metadata)
    result = run("inspect", lora_paths[0])
    assert result.code == 0
    assert "[/b] [red]x" in result.out
    assert "\x1b" not in result.out
