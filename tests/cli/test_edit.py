"""``hyperlora edit`` and ``evaluate --task edit``: files, images and errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyperlora import pretrained
from hyperlora.data.edit_pairs import read_image_pair
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.image_editing import edit_images
from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines.input_checks import check_pair
from hyperlora.pipelines.instruction_search import InstructionSearch
from hyperlora.pipelines.pair_to_lora import PairToLora


@pytest.fixture
def model_options(bundle: Any) -> list[Any]:
    return ["--model", bundle.pair_model, "--base", bundle.edit_base]


@pytest.fixture
def pair(bundle: Any) -> list[Path]:
    folder = bundle.edit_benchmark / "inverted"
    return [folder / "shown-0_before.png", folder / "shown-0_after.png"]


def get_second_pair(pair: list[Path]) -> list[Path]:
    return [path.with_name(path.name.replace("shown-0", "shown-1")) for path in pair]


def test_edit_writes_what_python_generates(
    run: Any, model_options: Any, pair: Any, bundle: Any, tmp_path: Path
) -> None:
    image_paths = get_second_pair(pair)
    output = tmp_path / "sub" / "change.safetensors"
    result = run(
        "edit",
        *pair,
        "--images",
        *image_paths,
        "--images-dir",
        tmp_path / "edited",
        "-o",
        output,
        "--steps",
        2,
        "--seed",
        7,
        "--strength",
        3,
        *model_options,
    )
    assert result.code == 0, result
    model = PairToLora.from_pretrained(bundle.pair_model)
    lora = model(tuple(pair), 3).weights
    lora_file = load_lora(output, model.layout)
    torch.testing.assert_close(lora_file.weights.flatten(), lora.flatten())
    assert lora_file.metadata.title == "change" and len(lora_file.metadata.reference_sha256) == 2
    base, images = load_diffusion_base(bundle.edit_base), [Image.open(o) for o in image_paths]
    for preserve_unedited, flags in ((True, []), (False, ["--no-preserve"])):
        expected = edit_images(
            base,
            images,
            lora,
            seeds=[7, 7],
            num_inference_steps=2,
            preserve_unedited=preserve_unedited,
        )
        result = run(
            "edit",
            *pair,
            "--images",
            *image_paths,
            "--images-dir",
            tmp_path / "edited",
            "--steps",
            2,
            "--seed",
            7,
            "--strength",
            3,
            *flags,
            *model_options,
        )
        for path, expected_image in zip(image_paths, expected, strict=True):
            actual = np.asarray(Image.open(tmp_path / "edited" / f"{path.stem}.png"), int)
            assert abs(actual - np.asarray(expected_image, int)).max() <= 2
            assert str(tmp_path / "edited" / f"{path.stem}.png") in result.out


def test_edit_takes_several_pairs_and_reverse(
    run: Any, model_options: Any, pair: Any, bundle: Any, tmp_path: Path
) -> None:
    model = PairToLora.from_pretrained(bundle.pair_model)
    expected_lora = model([tuple(pair), tuple(get_second_pair(pair))]).weights
    for flags, expected in (([], expected_lora), (["--reverse"], -expected_lora)):
        result = run(
            "edit",
            *pair,
            "--pair",
            *get_second_pair(pair),
            "-o",
            tmp_path / "c.safetensors",
            *flags,
            *model_options,
        )
        assert result.code == 0, result
        torch.testing.assert_close(
            load_lora(tmp_path / "c.safetensors", model.layout).weights.flatten(),
            expected.flatten(),
        )
    result = run(
        "edit",
        "--pair",
        *pair,
        "--pair",
        *get_second_pair(pair),
        "-o",
        tmp_path / "d.safetensors",
        *model_options,
    )
    assert result.code == 0, result
    written_lora = load_lora(tmp_path / "d.safetensors", model.layout).weights
    torch.testing.assert_close(written_lora.flatten(), expected_lora.flatten())


def test_edit_searches_unless_disabled(run: Any, tmp_path: Path) -> None:
    """With the bundled model: an edit of a kind that its network does not predict."""
    folder = next(pretrained.EDIT_BENCHMARK_DIR.glob("*-skin"))
    pair = [next(folder.glob(f"shown-0_{side}.*")) for side in ("before", "after")]
    base = load_diffusion_base(pretrained.EDIT_BASE_DIR)
    model = PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR, base=base)
    expected = {
        (): model(tuple(pair), search=InstructionSearch(base)).weights,
        ("--no-search",): model(tuple(pair)).weights,
    }
    for flags, lora in expected.items():
        result = run("edit", *pair, "-o", tmp_path / "c.safetensors", *flags)
        assert result.code == 0, result
        written_lora = load_lora(tmp_path / "c.safetensors", model.layout).weights
        torch.testing.assert_close(written_lora.flatten(), lora.flatten())
    assert not torch.allclose(expected[()].flatten(), expected["--no-search",].flatten(), atol=1e-3)
    result = run("edit", *pair, "-o", tmp_path / "d.safetensors", "--base", pretrained.BASE_DIR)
    assert result.code == 2 and "avatars/edit-base" in result.err
    assert result.err.count("error: ") == 1 and "Traceback" not in result.err


def test_edit_warns_of_unchanged_pair(
    run: Any, model_options: Any, pair: Any, tmp_path: Path
) -> None:
    result = run("edit", pair[0], pair[0], "-o", tmp_path / "c.safetensors", *model_options)
    assert result.code == 0 and "no change found" in result.err
    assert load_lora(tmp_path / "c.safetensors").weights.compute_delta_norms().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 75}),
        ("JPEG", {"quality": 90, "subsampling": 0}),
        ("WEBP", {"quality": 85}),
        ("AVIF", {"quality": 70}),
    ],
)
def test_edit_warns_of_copies(
    run: Any, model_options: Any, tmp_path: Path, kind: str, options: Any
) -> None:
    """Copies of a bundled image, saved in other ways; every bundled edit passes."""
    folder = pretrained.EDIT_BENCHMARK_DIR / "000-glasses"
    before, after = folder / "other-1_before.webp", folder / "other-1_after.webp"
    copy = tmp_path / f"copy.{kind.lower()}"
    Image.open(before).save(copy, kind, **options)
    output = ["-o", tmp_path / "c.safetensors", *model_options]
    assert "no change found" in run("edit", before, copy, *output).err
    assert "no change found" not in run("edit", before, after, *output).err


def test_check_pair_passes_every_bundled_edit() -> None:
    for before in sorted(pretrained.EDIT_BENCHMARK_DIR.glob("*/*_before.webp")):
        after = before.with_name(before.name.replace("_before", "_after"))
        warnings = check_pair(*read_image_pair(before, after))
        assert not any("no change found" in warning for warning in warnings), before


def test_edit_numbers_images_of_same_name(
    run: Any, model_options: Any, pair: Any, tmp_path: Path
) -> None:
    same_name = tmp_path / "other" / pair[0].name
    same_name.parent.mkdir()
    same_name.write_bytes(pair[1].read_bytes())
    result = run(
        "edit",
        *pair,
        "--images",
        pair[0],
        same_name,
        "--images-dir",
        tmp_path / "e",
        "--steps",
        1,
        *model_options,
    )
    assert result.code == 0, result
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "shown-0_before-2.png",
        "shown-0_before.png",
    ]


@pytest.mark.parametrize(
    ("change_arguments", "sentence"),
    [
        (lambda a: a[:1], "an image before and one after the edit are expected"),
        (lambda a: [], "no pair given"),
        (lambda a: [*a, "--pair", a[0]], "--pair needs two images"),
        (lambda a: [a[0], "missing.png"], "there is no file 'missing.png'"),
        (lambda a: [*a, "--format", "gguf"], "known: auto, diffusers, kohya"),
        (lambda a: [*a, "--strength", "nan"], "strength between -10 and 10"),
        (lambda a: [*a, "--candidate-prompt", "a hat", "--no-search"], "leave one out"),
        (lambda a: [*a, "--candidate-prompt", "a hat"], "this one has none"),
    ],
)
def test_edit_refuses_bad_input(
    run: Any, model_options: Any, pair: Any, tmp_path: Path, change_arguments: Any, sentence: str
) -> None:
    result = run("edit", *change_arguments(pair), "-o", tmp_path / "c.safetensors", *model_options)
    assert result.code == 2 and result.err.count("error: ") == 1 and sentence in result.err, result
    assert "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


def test_edit_refuses_missing_output_and_wrong_base(
    run: Any, model_options: Any, pair: Any, bundle: Any, tmp_path: Path
) -> None:
    assert "Give -o FILE, or --images IMAGE" in run("edit", *pair, *model_options).err
    result = run(
        "edit",
        *pair,
        "--images",
        pair[0],
        "--images-dir",
        tmp_path / "e",
        "--base",
        bundle.base,
        *model_options[:2],
    )
    assert result.code == 2 and "bundle" not in result.err, result
    wide_image = tmp_path / "wide.png"
    Image.new("RGB", (30, 20)).save(wide_image)
    result = run("edit", pair[0], wide_image, "-o", tmp_path / "c.safetensors", *model_options)
    assert result.code == 2 and "the same size is expected" in result.err


def test_evaluate_scores_edits(run: Any, model_options: Any, bundle: Any, tmp_path: Path) -> None:
    result = run(
        "evaluate",
        bundle.edit_benchmark,
        "--task",
        "edit",
        "--evaluator",
        bundle.evaluator,
        "--steps",
        1,
        "--finetune-steps",
        1,
        "--report-dir",
        tmp_path / "r",
        "--json",
        *model_options,
    )
    assert result.code == 0, result
    report = json.loads(result.out)
    assert report["edits"] == 2
    assert set(report["reversal"]) == {
        "negated_lora",
        "negated_lora_preserved",
        "reversed_pair",
        "reversed_pair_preserved",
        "vae_round_trip",
        "unchanged_input",
    }
    assert (tmp_path / "r" / "sheet.png").is_file()
    result = run("evaluate", bundle.edit_benchmark, "--task", "sideways")
    assert result.code == 2 and "known: subject, edit" in result.err
    result = run(
        "evaluate",
        bundle.edit_benchmark,
        "--task",
        "edit",
        "--model",
        bundle.pair_model,
        "--base",
        bundle.base,
    )
    assert result.code == 2 and "one that edits images was expected" in result.err
