"""``generate`` with networks that others released: files, headers, and bad input."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

pytest.importorskip("insightface")

from hyperlora.lora.io.load import load_lora
from tests.pipelines.released.tiny_hyperlora import draw_portrait, open_model, save_world

TRIGGER = "fcsks fxhks fhyks, "


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("hyperlora"))


@pytest.fixture(scope="module")
def options(world: Path) -> list[Any]:
    return ["--face-pack", world / "antelopev2", "--encoder", world / "clip"]


@pytest.mark.parametrize("format", ["diffusers", "kohya", "sgm"])
def test_generate_writes_a_lora_with_trigger_strength_and_licenses(
    world: Path, options: list[Any], run: Any, tmp_path: Path, format: str
) -> None:
    output = tmp_path / "me.safetensors"
    result = run(
        "generate", world / "me.png", "--model", world / "HyperLoRA", "-o", output,
        *options, "--format", format,
    )  # fmt: skip
    assert result.code == 0, result
    assert result.err.count("CC BY-NC 4.0") == 1 and "antelopev2" in result.err
    assert TRIGGER in result.err and "0.8" in result.err
    file = load_lora(output)
    assert file.metadata.trigger_phrase == TRIGGER.rstrip(", ")
    assert file.metadata.recommended_strength == 0.8
    assert file.metadata.license == "CC BY-NC 4.0" and file.metadata.encoder_license == "MIT"
    extra = file.metadata.extra
    assert extra["hyperlora.prompt_prefix"] == TRIGGER
    assert extra["hyperlora.commercial_use"] == "no"
    assert "non-commercial" in extra["hyperlora.face_pack_license"]
    assert len(file.weights.layout.targets) == 88
    with safe_open(output, "pt") as tensors:
        dtypes = {tensors.get_slice(key).get_dtype() for key in list(tensors.keys())}
        assert dtypes <= {"F16", "F32"} and "F16" in dtypes  # float32 is that of alpha
    expected = open_model(world)([world / "me.png"]).weights
    torch.testing.assert_close(
        file.weights.compute_delta_norms().sort().values,
        expected.compute_delta_norms().sort().values,
        atol=1e-3,
        rtol=1e-2,
    )


def test_generate_folder_skips_subjects_without_face(
    world: Path, options: list[Any], run: Any, tmp_path: Path
) -> None:
    people = tmp_path / "people"
    people.mkdir()
    draw_portrait(3).save(people / "anna.png")
    Image.new("RGB", (200, 200), "white").save(people / "wall.png")
    arguments = ("generate", "--input-dir", people, "--model", world / "HyperLoRA:edit", *options)
    result = run(*arguments, "-o", tmp_path / "out")
    assert result.code == 0 and "'wall': no face" in result.err, result
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == ["anna.safetensors"]
    stamp = (tmp_path / "out/anna.safetensors").stat().st_mtime_ns
    assert run(*arguments, "-o", tmp_path / "out").code == 0
    assert (tmp_path / "out/anna.safetensors").stat().st_mtime_ns == stamp, "resumes"


def test_two_faces_are_told(world: Path, options: list[Any], run: Any, tmp_path: Path) -> None:
    pair = Image.new("RGB", (520, 256), "white")
    pair.paste(draw_portrait(3), (0, 0))
    pair.paste(draw_portrait(9), (264, 0))
    pair.save(tmp_path / "pair.png")
    result = run(
        "generate", tmp_path / "pair.png", "--model", world / "HyperLoRA", *options,
        "-o", tmp_path / "x.safetensors",
    )  # fmt: skip
    assert result.code == 0 and "2 faces are in the photo" in result.err, result
    assert "left" in result.err or "right" in result.err


def break_pack(world: Path, target: Path) -> list[Any]:
    shutil.copytree(world / "antelopev2", target / "pack")
    (target / "pack/glintr100.onnx").rename(target / "pack/w600k_r50.onnx")
    return ["--face-pack", target / "pack"]


def miss_pack(world: Path, target: Path) -> list[Any]:
    return ["--face-pack", target / "nowhere"]


def fetch_half(world: Path, target: Path) -> list[Any]:
    shutil.copytree(world / "HyperLoRA", target / "half")
    (target / "half/sdxl_hyper_id_lora_v1_fidelity/resampler.safetensors").unlink()
    return ["--model", target / "half"]


def cut_off(world: Path, target: Path) -> list[Any]:
    shutil.copytree(world / "HyperLoRA", target / "cut")
    path = target / "cut/sdxl_hyper_id_lora_v1_fidelity/hyper_lora_modules.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return ["--model", target / "cut"]


def mix_variants(world: Path, target: Path) -> list[Any]:
    shutil.copytree(world / "HyperLoRA", target / "mixed")
    folder = target / "mixed/sdxl_hyper_id_lora_v1_fidelity"
    index = json.loads((folder / "hyper_lora_modules.json").read_text())
    index.popitem()
    (folder / "hyper_lora_modules.json").write_text(json.dumps(index))
    return ["--model", target / "mixed"]


@pytest.mark.parametrize(
    ("break_input", "sentence"),
    [
        (break_pack, "is the face pack buffalo_l or buffalo_m, which gives another person"),
        (miss_pack, "there is no face pack"),
        (fetch_half, "is half fetched: sdxl_hyper_id_lora_v1_fidelity/resampler.safetensors"),
        (cut_off, "is cut off"),
        (mix_variants, "expected: fetch it again"),
        (lambda w, t: ["--model", f"{w / 'HyperLoRA'}:nude"], "no variant 'nude'; it has: edit"),
        (lambda w, t: ["--model", w / "clip"], "holds no network from photos to LoRAs"),
        (lambda w, t: ["--encoder", w / "HyperLoRA"], "lacks config.json"),
        (lambda w, t: ["--revision", "main"], "is a folder and has no revisions"),
        (lambda w, t: ["--method", "lora-diffusion"], "leave it out"),
        (lambda w, t: ["--num-loras", "2"], "is deterministic"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_writes_nothing(
    world: Path, options: list[Any], run: Any, tmp_path: Path, break_input: Any, sentence: str
) -> None:
    output = tmp_path / "out" / "x.safetensors"
    result = run(
        "generate", world / "me.png", "--model", world / "HyperLoRA", *options, "-o", output,
        *break_input(world, tmp_path),
    )  # fmt: skip
    assert result.code == 2 and sentence in result.err, result
    assert len([line for line in result.err.splitlines() if line.startswith("error:")]) == 1
    assert not output.parent.exists()


def test_photo_without_face_writes_nothing(
    world: Path, options: list[Any], run: Any, tmp_path: Path
) -> None:
    Image.new("RGB", (200, 200), "white").save(tmp_path / "wall.png")
    output = tmp_path / "x.safetensors"
    result = run(
        "generate", tmp_path / "wall.png", "--model", world / "HyperLoRA", *options, "-o", output
    )
    assert result.code == 2 and "error: no face was found" in result.err, result
    assert not output.exists()


def test_missing_extra_is_named(
    world: Path, options: list[Any], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "insightface.model_zoo", None)
    output = tmp_path / "x.safetensors"
    result = run(
        "generate", world / "me.png", "--model", world / "HyperLoRA", *options, "-o", output
    )
    assert result.code == 2 and "pip install 'hyperlora[face]'" in result.err, result
