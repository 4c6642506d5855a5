"""``generate_images``, ``inspect``, ``evaluate``, ``run_demo``, ``train``: what they say and write."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from hyperlora.cli.options import parse_weighted_path
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.pipelines.image_to_lora import ImageToLora

RunCommand = Callable[..., Any]
PROMPT = "a portrait of sks person, smiling"
COMMANDS = [
    "demo",
    "edit",
    "generate",
    "render",
    "inspect",
    "evaluate",
    "train",
    "convert",
    "combine",
    "diff",
    "resize",
    "scale",
    "split",
]


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
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("C:\\a.safetensors:-2", ("C:\\a.safetensors", -2.0)),
        ("C:\\a.safetensors", ("C:\\a.safetensors", 1.0)),
    ],
)
def test_parse_weighted_path_splits_weight(text: str, expected: tuple[str, float]) -> None:
    assert parse_weighted_path(text) == (Path(expected[0]), expected[1])


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


EVALUATE = ["--steps", 1, "--guidance-scale", 1]


def list_model_options(bundle: Any) -> list[Any]:
    return ["--model", bundle.model, "--base", bundle.base, "--evaluator", bundle.evaluator]


def test_evaluate_scores_all_variants(run: RunCommand, bundle: Any, tmp_path: Path) -> None:
    options = ["--refine-steps", 1, "--finetune-steps", 1, "--report-dir", tmp_path / "report"]
    result = run("evaluate", bundle.benchmark, *list_model_options(bundle), *EVALUATE, *options, "--json")
    assert result.code == 0, result
    report = json.loads(result.out)
    assert report["num_subjects"] == 4
    assert [score["name"] for score in report["results"]] == [
        "base, no LoRA",
        "one photo",
        "one photo, strength 0.6",
        "one photo, strength 0.8",
        "2 photos",
        "shuffled: another's LoRA",
        "mean LoRA",
        "one photo, refined 1 steps",
        "fitted per subject, 1 steps",
    ]
    for score in report["results"]:
        assert 0 <= score["prompt"] <= 1
        assert score["identity_error"] > 0
        assert (score["seconds"] is None) == (
            score["name"] in ("base, no LoRA", "shuffled: another's LoRA", "mean LoRA")
        )
    assert len({score["identity"] for score in report["results"][:3]}) == 3, "the LoRA changes nothing"
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
        "report.md",
        "scores.png",
        "sheet.png",
    ]
    assert "| one photo |" in (tmp_path / "report" / "report.md").read_text()


def test_evaluate_scores_plain_folder(run: RunCommand, bundle: Any, tmp_path: Path) -> None:
    for subject, photos in (("a", 2), ("b", 3)):
        (tmp_path / subject).mkdir()
        for i in range(photos):
            shutil.copy(bundle.subjects / "person-1" / f"{i}.png", tmp_path / subject)
    result = run("evaluate", tmp_path, *list_model_options(bundle), *EVALUATE)
    assert result.code == 0, result
    assert "prompt accuracy needs prompts with known truth" in result.out
    assert "identity has no second real photo" in result.out
    result = run(
        "evaluate",
        tmp_path,
        *list_model_options(bundle),
        *EVALUATE,
        "--num-subjects",
        1,
        "--report-dir",
        tmp_path / "r",
        "--json",
    )
    assert result.code == 0, result
    results = json.loads(result.out)["results"]
    assert "mean LoRA" not in [score["name"] for score in results]
    assert all(score["prompt"] is None for score in results)


def test_load_benchmark_splits_photos(bundle: Any) -> None:
    info = load_benchmark(bundle.benchmark, 16, 3)
    assert info.names == ("person-0", "person-1", "person-2")
    assert info.photos.shape == info.comparison_photos.shape == (3, 2, 3, 16, 16)
    assert info.has_truth


def test_demo_writes_sheets_and_loras(run: RunCommand, bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperlora import pretrained

    tiny_dirs = {
        "BASE_DIR": bundle.base,
        "IMAGE_TO_LORA_DIR": bundle.model,
        "EVALUATOR_DIR": bundle.evaluator,
        "BENCHMARK_DIR": bundle.benchmark,
        "EDIT_BASE_DIR": bundle.edit_base,
        "PAIR_TO_LORA_DIR": bundle.pair_model,
        "EDIT_BENCHMARK_DIR": bundle.edit_benchmark,
        "MODEL_DIR_BY_METHOD": {"hypernetwork": bundle.model},
    }
    for name, folder in tiny_dirs.items():
        monkeypatch.setattr(pretrained, name, folder)
    result = run("demo", "-o", tmp_path / "demo", "--num-subjects", 2)
    assert result.code == 0, result
    assert "ms from photo to LoRA" in result.out
    edits = tmp_path / "demo" / "edits"
    assert sorted(p.name for p in edits.iterdir()) == ["darker.safetensors", "inverted.safetensors"]
    names = sorted(p.name for p in (tmp_path / "demo").iterdir() if p != edits)
    subjects = ("person-0", "person-1")
    assert names == [
        "demo.png",
        "edits.png",
        *(f"{p}.{end}" for p in subjects for end in ("kohya.safetensors", "safetensors")),
    ]
    assert load_lora(tmp_path / "demo" / "person-1.kohya.safetensors").format == "kohya"


@pytest.mark.parametrize("verb", ["", *COMMANDS])
def test_help_imports_no_heavy_library(run_process: RunCommand, command: str) -> None:
    heavy_check = "print('heavy:', *{'torch', 'numpy', 'PIL', 'diffusers', 'lightning'} & {*sys.modules}, file=sys.stderr)"
    result = run_process(*([command] if command else []), "--help", then=heavy_check)
    assert (result.code, result.err.strip()) == (0, "heavy:")
    assert "Usage: " in result.out
    assert all(name in result.out for name in COMMANDS if not command)


@pytest.mark.slow
def test_train_shows_help_of_lightning(run_process: RunCommand) -> None:
    result = run_process("train", "fit", "--help")
    assert result.code == 0, result
    assert "--trainer.max_epochs" in result.out
