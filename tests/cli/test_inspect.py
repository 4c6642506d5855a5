"""``hyperlora inspect``: what a LoRA file is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
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


def test_inspect_escapes_metadata(run: RunCommand, lora_paths: list[Path]) -> None:
    unsafe_metadata = {"modelspec.title": "[/b] [red]x \x1b[31m"}
    save_file(load_file(lora_paths[0]), lora_paths[0], metadata=unsafe_metadata)
    result = run("inspect", lora_paths[0])
    assert result.code == 0
    assert "[/b] [red]x" in result.out
    assert "\x1b" not in result.out
