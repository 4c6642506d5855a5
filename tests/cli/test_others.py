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

Run = Callable[..., Any]
PROMPT = "a portrait of sks person, smiling"
VERBS = [
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


def pixels(image: Image.Image | Path) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image, int)


@pytest.fixture
def loras(bundle: Any, tmp_path: Path) -> list[Path]:
    model = ImageToLora.from_pretrained(str(bundle.model))
    return [
        replace(
            model(bundle.subjects / f"person-{i}" / "0.png"), metadata=LoraMetadata(title=f"p{i}")
        ).save(tmp_path / f"p{i}.safetensors", format=format)
        for i, format in enumerate(("diffusers", "kohya"))
    ]


def test_render_draws_what_the_library_draws(
    run: Run, bundle: Any, loras: list[Path], tmp_path: Path
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
    pictures = {}
    for name, files in {
        "none": [],
        "one": [loras[0]],
        "two": [f"{loras[0]}:0.5", f"{loras[1]}:-0.7"],
    }.items():
        ran = run(
            "render",
            "-o",
            tmp_path / "new" / f"{name}.png",
            *options,
            *(x for f in files for x in ("--lora", f)),
        )
        assert (ran.code, ran.out.strip()) == (0, str(tmp_path / "new" / f"{name}.png"))
        assert "note:" not in ran.err
        pictures[name] = pixels(tmp_path / "new" / f"{name}.png")
    a, b = (load_lora(path, modules=base.modules).weights for path in loras)
    for name, lora in {"none": None, "one": a, "two": 0.5 * a + -0.7 * b}.items():
        (image,) = generate_images(
            base, [PROMPT], lora, seeds=[5], num_inference_steps=3, guidance_scale=2
        )
        assert np.abs(pictures[name] - pixels(image)).max() <= 2
    for one, other in (("none", "one"), ("one", "two"), ("none", "two")):
        assert np.abs(pictures[one] - pictures[other]).mean() > 1, (
            f"{one} and {other} look the same"
        )
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "none.png",
        "one.png",
        "two.png",
    ]


def test_render_notes_another_base(
    run: Run, bundle: Any, loras: list[Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle.base, tmp_path / "finetuned")
    arguments = [
        "render",
        "--prompt",
        PROMPT,
        "-o",
        tmp_path / "x.png",
        "--steps",
        1,
        "--lora",
        loras[0],
    ]
    ran = run(*arguments, "--base", copy)
    assert ran.code == 0
    assert (
        f"note: p0.safetensors was made for '{bundle.base.parent.name}/base', not for this base"
        in ran.err
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
def test_weights_of_files(text: str, expected: tuple[str, float]) -> None:
    assert parse_weighted_path(text) == (Path(expected[0]), expected[1])


def test_inspect(run: Run, bundle: Any, loras: list[Path]) -> None:
    for path, format in zip(loras, ("diffusers", "kohya"), strict=True):
        ran = run("inspect", path)
        assert ran.code == 0
        for said in (path.name, format, f"{bundle.base.parent.name}/base", "header title"):
            assert said in ran.out
        found = json.loads(run("inspect", path, "--base", bundle.base, "--json").out)
        assert (found["format"], found["fits"], found["ranks"]) == (
            format,
            str(bundle.base),
            {"2": found["sites"]},
        )
        assert found["norm"] > 0
        assert "fits" not in json.loads(run("inspect", path, "--json").out)


def test_inspect_shows_a_strangers_header_as_it_stands(run: Run, loras: list[Path]) -> None:
    odd = {"modelspec.title": "[/b] [red]x \x1b[31m"}
    save_file(load_file(loras[0]), loras[0], metadata=odd)
    ran = run("inspect", loras[0])
    assert ran.code == 0
    assert "[/b] [red]x" in ran.out
    assert "\x1b" not in ran.out


EVALUATE = ["--steps", 1, "--guidance-scale", 1]


def models(bundle: Any) -> list[Any]:
    return ["--model", bundle.model, "--base", bundle.base, "--evaluator", bundle.evaluator]


def test_evaluate_every_row(run: Run, bundle: Any, tmp_path: Path) -> None:
    options = ["--refine-steps", 1, "--finetune-steps", 1, "--report-dir", tmp_path / "report"]
    ran = run("evaluate", bundle.benchmark, *models(bundle), *EVALUATE, *options, "--json")
    assert ran.code == 0, ran
    said = json.loads(ran.out)
    assert said["people"] == 4
    assert [row["name"] for row in said["rows"]] == [
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
    for row in said["rows"]:
        assert 0 <= row["prompt"] <= 1
        assert row["identity_error"] > 0
        assert (row["seconds"] is None) == (
            row["name"] in ("base, no LoRA", "shuffled: another's LoRA", "mean LoRA")
        )
    assert len({row["identity"] for row in said["rows"][:3]}) == 3, "the LoRA changes nothing"
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
        "report.md",
        "scores.png",
        "sheet.png",
    ]
    assert "| one photo |" in (tmp_path / "report" / "report.md").read_text()


def test_evaluate_a_folder_of_ones_own(run: Run, bundle: Any, tmp_path: Path) -> None:
    for person, photos in (("a", 2), ("b", 3)):
        (tmp_path / person).mkdir()
        for i in range(photos):
            shutil.copy(bundle.subjects / "person-1" / f"{i}.png", tmp_path / person)
    ran = run("evaluate", tmp_path, *models(bundle), *EVALUATE)
    assert ran.code == 0, ran
    assert "P needs prompts with known truth" in ran.out
    assert "I has no second real photo" in ran.out
    ran = run(
        "evaluate",
        tmp_path,
        *models(bundle),
        *EVALUATE,
        "--num-subjects",
        1,
        "--report-dir",
        tmp_path / "r",
        "--json",
    )
    assert ran.code == 0, ran
    rows = json.loads(ran.out)["rows"]
    assert "mean LoRA" not in [row["name"] for row in rows]
    assert all(row["prompt"] is None for row in rows)


def test_a_benchmark_is_halved(bundle: Any) -> None:
    found = load_benchmark(bundle.benchmark, 16, 3)
    assert found.names == ("person-0", "person-1", "person-2")
    assert found.photos.shape == found.comparison_photos.shape == (3, 2, 3, 16, 16)
    assert found.has_truth


def test_demo(run: Run, bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperlora import pretrained as shipped

    tiny = {
        "BASE": bundle.base,
        "MODEL": bundle.model,
        "EVALUATOR": bundle.evaluator,
        "BENCHMARK": bundle.benchmark,
        "EDIT_BASE": bundle.edit_base,
        "PAIR_MODEL": bundle.pair_model,
        "EDIT_BENCHMARK": bundle.edit_benchmark,
        "PHOTO_MODELS": {"hyperdreambooth": bundle.model},
    }
    for name, folder in tiny.items():
        monkeypatch.setattr(shipped, name, folder)
    ran = run("demo", "-o", tmp_path / "demo", "--num-subjects", 2)
    assert ran.code == 0, ran
    assert "ms from photo to LoRA" in ran.out
    edits = tmp_path / "demo" / "edits"
    assert sorted(p.name for p in edits.iterdir()) == ["darker.safetensors", "inverted.safetensors"]
    made = sorted(p.name for p in (tmp_path / "demo").iterdir() if p != edits)
    people = ("person-0", "person-1")
    assert made == [
        "demo.png",
        "edits.png",
        *(f"{p}.{end}" for p in people for end in ("kohya.safetensors", "safetensors")),
    ]
    assert load_lora(tmp_path / "demo" / "person-1.kohya.safetensors").format == "kohya"


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_instant(shell: Run, verb: str) -> None:
    heavy = "print('heavy:', *{'torch', 'numpy', 'PIL', 'diffusers', 'lightning'} & {*sys.modules}, file=sys.stderr)"
    ran = shell(*([verb] if verb else []), "--help", then=heavy)
    assert (ran.code, ran.err.strip()) == (0, "heavy:")
    assert "Usage: " in ran.out
    assert all(name in ran.out for name in VERBS if not verb)


@pytest.mark.slow
def test_lightnings_own_help(shell: Run) -> None:
    ran = shell("train", "fit", "--help")
    assert ran.code == 0, ran
    assert "--trainer.max_epochs" in ran.out
