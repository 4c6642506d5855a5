"""``main_callback edit`` and ``evaluate --task edit``: files, pictures, and one sentence for what cannot be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyperlora import pretrained
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.image_editing import edit_images
from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines.instruction_search import generate_with_search
from hyperlora.pipelines.pair_to_lora import PairToLora


@pytest.fixture
def models(bundle: Any) -> list[Any]:
    return ["--model", pretrained.pair_model, "--base", pretrained.edit_base]


@pytest.fixture
def pair(bundle: Any) -> list[Path]:
    folder = pretrained.edit_benchmark / "inverted"
    return [folder / "shown-0_before.png", folder / "shown-0_after.png"]


def second(pair: list[Path]) -> list[Path]:
    return [path.with_name(path.name.replace("shown-0", "shown-1")) for path in pair]


def test_a_file_and_pictures_as_python_makes_them(
    run: Any, models: Any, pair: Any, bundle: Any, tmp_path: Path
) -> None:
    others = second(pair)
    out = tmp_path / "sub" / "change.safetensors"
    done = run(
        "edit",
        *pair,
        "--apply",
        *others,
        "--images-out",
        tmp_path / "edited",
        "-o",
        out,
        "--steps",
        2,
        "--seed",
        7,
        "--strength",
        3,
        *models,
    )
    assert done.code == 0, done
    model = PairToLora.from_pretrained(pretrained.pair_model)
    change = model(tuple(pair), 3)
    file = load_lora(out, model.layout)
    torch.testing.assert_close(file.weights.flatten(), change.flatten())
    assert file.metadata.title == "change" and len(file.metadata.reference_sha256) == 2
    base, opened = load_diffusion_base(pretrained.edit_base), [Image.open(o) for o in others]
    for keep_rest, flags in ((True, []), (False, ["--repaint"])):
        expected = edit_images(
            base, opened, change, seeds=[7, 7], num_inference_steps=2, preserve_unedited=keep_rest
        )
        done = run(
            "edit",
            *pair,
            "--apply",
            *others,
            "--images-out",
            tmp_path / "edited",
            "--steps",
            2,
            "--seed",
            7,
            "--strength",
            3,
            *flags,
            *models,
        )
        for path, picture in zip(others, expected, strict=True):
            drawn = np.asarray(Image.open(tmp_path / "edited" / f"{path.stem}.png"), int)
            assert abs(drawn - np.asarray(picture, int)).max() <= 2
            assert str(tmp_path / "edited" / f"{path.stem}.png") in done.out


def test_further_pairs_and_reverse(
    run: Any, models: Any, pair: Any, bundle: Any, tmp_path: Path
) -> None:
    model = PairToLora.from_pretrained(pretrained.pair_model)
    both = model([tuple(pair), tuple(second(pair))])
    for flags, expected in (([], both), (["--reverse"], -both)):
        done = run(
            "edit",
            *pair,
            "--pair",
            *second(pair),
            "-o",
            tmp_path / "c.safetensors",
            *flags,
            *models,
        )
        assert done.code == 0, done
        torch.testing.assert_close(
            load_lora(tmp_path / "c.safetensors", model.layout).weights.flatten(),
            expected.flatten(),
        )
    done = run(
        "edit", "--pair", *pair, "--pair", *second(pair), "-o", tmp_path / "d.safetensors", *models
    )
    assert done.code == 0, done
    found = load_lora(tmp_path / "d.safetensors", model.layout).weights
    torch.testing.assert_close(found.flatten(), both.flatten())


def test_words_are_tried_unless_asked_not_to(run: Any, tmp_path: Path) -> None:
    """With the bundle: what its network was never shown."""
    folder = next(pretrained.EDIT_BENCHMARK_DIR.glob("*-skin"))
    pair = [next(folder.glob(f"shown-0_{side}.*")) for side in ("before", "after")]
    base = load_diffusion_base(pretrained.EDIT_BASE_DIR)
    model = PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR, base=base)
    expected = {
        (): generate_with_search(model, base, tuple(pair)),
        ("--one-pass",): model(tuple(pair)),
    }
    for flags, lora in expected.items():
        done = run("edit", *pair, "-o", tmp_path / "c.safetensors", *flags)
        assert done.code == 0, done
        found = load_lora(tmp_path / "c.safetensors", model.layout).weights
        torch.testing.assert_close(found.flatten(), lora.flatten())
    assert not torch.allclose(expected[()].flatten(), expected["--one-pass",].flatten(), atol=1e-3)
    done = run("edit", *pair, "-o", tmp_path / "d.safetensors", "--base", pretrained.BASE_DIR)
    assert done.code == 2 and "avatars/edit-base" in done.err and done.err.count("\n") == 1


def test_what_is_doubtful_is_said(run: Any, models: Any, pair: Any, tmp_path: Path) -> None:
    done = run("edit", pair[0], pair[0], "-o", tmp_path / "c.safetensors", *models)
    assert done.code == 0 and "no change found" in done.err
    assert load_lora(tmp_path / "c.safetensors").weights.compute_delta_norms().max() < 1e-5


def test_pictures_of_one_name_do_not_meet(run: Any, models: Any, pair: Any, tmp_path: Path) -> None:
    copy = tmp_path / "other" / pair[0].name
    copy.parent.mkdir()
    copy.write_bytes(pair[1].read_bytes())
    done = run(
        "edit",
        *pair,
        "--apply",
        pair[0],
        copy,
        "--images-out",
        tmp_path / "e",
        "--steps",
        1,
        *models,
    )
    assert done.code == 0, done
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "shown-0_before-2.png",
        "shown-0_before.png",
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a[:1], "a picture before and one after the edit are expected"),
        (lambda a: [], "no pair given"),
        (lambda a: [*a, "--pair", a[0]], "--pair needs two pictures"),
        (lambda a: [a[0], "missing.png"], "there is no file 'missing.png'"),
        (lambda a: [*a, "--format", "gguf"], "known: diffusers, kohya"),
        (lambda a: [*a, "--strength", "nan"], "strength between -10 and 10"),
        (lambda a: [*a, "--try", "a hat", "--one-pass"], "leave one out"),
        (lambda a: [*a, "--try", "a hat"], "this one says none"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Any, models: Any, pair: Any, tmp_path: Path, change: Any, sentence: str
) -> None:
    done = run("edit", *change(pair), "-o", tmp_path / "c.safetensors", *models)
    assert done.code == 2 and done.err.count("\n") == 1 and sentence in done.err, done
    assert not list(tmp_path.iterdir())


def test_nothing_to_do_and_wrong_bases(
    run: Any, models: Any, pair: Any, bundle: Any, tmp_path: Path
) -> None:
    assert "Give -o FILE, or --apply IMAGE" in run("edit", *pair, *models).err
    done = run(
        "edit",
        *pair,
        "--apply",
        pair[0],
        "--images-out",
        tmp_path / "e",
        "--base",
        pretrained.base,
        *models[:2],
    )
    assert done.code == 2 and "bundle" not in done.err, done
    wide = tmp_path / "wide.png"
    Image.new("RGB", (30, 20)).save(wide)
    done = run("edit", pair[0], wide, "-o", tmp_path / "c.safetensors", *models)
    assert done.code == 2 and "the same size is expected" in done.err


def test_evaluate_edits(run: Any, models: Any, bundle: Any, tmp_path: Path) -> None:
    done = run(
        "evaluate",
        pretrained.edit_benchmark,
        "--task",
        "edit",
        "--evaluator",
        pretrained.evaluator,
        "--steps",
        1,
        "--fit",
        1,
        "--report",
        tmp_path / "r",
        "--json",
        *models,
    )
    assert done.code == 0, done
    told = json.loads(done.out)
    assert told["edits"] == 2
    assert {"undone", "undone_kept", "turned", "turned_kept", "round_trip", "untouched"} == set(
        told["reverse"]
    )
    assert (tmp_path / "r" / "sheet.png").is_file()
    done = run("evaluate", pretrained.edit_benchmark, "--task", "sideways")
    assert done.code == 2 and "known: portrait, edit" in done.err
    done = run(
        "evaluate",
        pretrained.edit_benchmark,
        "--task",
        "edit",
        "--model",
        pretrained.pair_model,
        "--base",
        pretrained.base,
    )
    assert done.code == 2 and "one that edits images was expected" in done.err
