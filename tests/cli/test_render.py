"""``hyperlora render``: images of one LoRA file or several."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hyperlora.cli.options import parse_weighted_path
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.pipelines.image_to_lora import ImageToLora

RunCommand = Callable[..., Any]
PROMPT = "a portrait of sks person, smiling"


def to_pixels(image: Image.Image | Path) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image, int)


@pytest.fixture
def lora_paths(bundle: Any, tmp_path: Path) -> list[Path]:
    model = ImageToLora.from_pretrained(str(bundle.model))
    return [
        replace(
            model(bundle.subjects / f"person-{i}" / "0.png"), metadata=LoraMetadata(title=f"p{i}")
        ).save(tmp_path / f"p{i}.safetensors", format=format)
        for i, format in enumerate(("diffusers", "kohya"))
    ]


def test_render_matches_generate_images(
    run: RunCommand, bundle: Any, lora_paths: list[Path], tmp_path: Path
) -> None:
    base = load_diffusion_base(bundle.base)
    options = [
        "--prompt",
        PROMPT,
        "--base",
        bundle.base,
        "--steps",
        3,
        "--seed",
        5,
        "--guidance-scale",
        2,
    ]
    images_by_name = {}
    for name, files in {
        "none": [],
        "one": [lora_paths[0]],
        "two": [f"{lora_paths[0]}:0.5", f"{lora_paths[1]}:-0.7"],
    }.items():
        result = run(
            "render",
            "-o",
            tmp_path / "new" / f"{name}.png",
            *options,
            *(x for f in files for x in ("--lora", f)),
        )
        assert (result.code, result.out.strip()) == (0, str(tmp_path / "new" / f"{name}.png"))
        assert "note:" not in result.err
        images_by_name[name] = to_pixels(tmp_path / "new" / f"{name}.png")
    a, b = (load_lora(path, modules=base.modules).weights for path in lora_paths)
    for name, lora in {"none": None, "one": a, "two": 0.5 * a + -0.7 * b}.items():
        (image,) = generate_images(
            base, [PROMPT], lora, seeds=[5], num_inference_steps=3, guidance_scale=2
        )
        assert np.abs(images_by_name[name] - to_pixels(image)).max() <= 2
    for first, second in (("none", "one"), ("one", "two"), ("none", "two")):
        assert np.abs(images_by_name[first] - images_by_name[second]).mean() > 1, (
            f"{first} and {second} look the same"
        )
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "none.png",
        "one.png",
        "two.png",
    ]


def test_render_notes_other_base(
    run: RunCommand, bundle: Any, lora_paths: list[Path], tmp_path: Path
) -> None:
    other_base = shutil.copytree(bundle.base, tmp_path / "finetuned")
    arguments = [
        "render",
        "--prompt",
        PROMPT,
        "-o",
        tmp_path / "x.png",
        "--steps",
        1,
        "--lora",
        lora_paths[0],
    ]
    result = run(*arguments, "--base", other_base)
    assert result.code == 0
    assert (
        f"note: p0.safetensors was made for '{bundle.base.parent.name}/base', not for this base"
        in result.err
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", None)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("C:\\a.safetensors:-2", ("C:\\a.safetensors", -2.0)),
        ("C:\\a.safetensors", ("C:\\a.safetensors", None)),
    ],
)
def test_parse_weighted_path_splits_weight(text: str, expected: tuple[str, float | None]) -> None:
    assert parse_weighted_path(text) == (Path(expected[0]), expected[1])
