"""``combine`` and ``diff`` of the files of networks that others released: weights and headers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("insightface")

from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.negative_lora import NEGATIVE_LORA_KEY, NEGATIVE_SHA256_KEY
from tests.pipelines.released.tiny_hyperlora import draw_portrait, open_model, save_world

PREFIX = "fcsks fxhks fhyks, "


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Anna of both variants, and Ben."""
    world = save_world(tmp_path_factory.mktemp("hyperlora"))
    for name, variant, seed in (("fid", "", 3), ("edit", ":edit", 3), ("ben", "", 5)):
        photo = draw_portrait(seed)
        photo.save(world / f"{name}.png")
        lora = open_model(world, variant)([world / f"{name}.png"])
        lora.save(world / f"{name}.safetensors", format="kohya", dtype=torch.float16)
    return world


def compute_deltas(path: Path) -> dict[str, torch.Tensor]:
    """up · down · alpha / rank of every module, from the tensors of a kohya file."""
    tensors = {key: tensor.double() for key, tensor in load_file(path).items()}
    deltas = {}
    for key, down in tensors.items():
        if stem := key.removesuffix(".lora_down.weight") if "lora_down" in key else "":
            scale = tensors[f"{stem}.alpha"] / len(down)
            deltas[stem] = tensors[f"{stem}.lora_up.weight"] @ down * scale
    return deltas


def assert_sum(path: Path, terms: dict[Path, float]) -> None:
    expected = {source: compute_deltas(source) for source in terms}
    deltas = compute_deltas(path)
    assert len(deltas) == 88 and all(d.keys() == deltas.keys() for d in expected.values())
    for stem, delta in deltas.items():
        total = sum(weight * expected[source][stem] for source, weight in terms.items())
        assert isinstance(total, torch.Tensor) and total.abs().max() > 0
        torch.testing.assert_close(delta, total, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.45)])
def test_combine_sums_fidelity_and_edit_and_keeps_their_header(
    files: Path, run: Any, tmp_path: Path, weights: tuple[float, float]
) -> None:
    sources = files / "fid.safetensors", files / "edit.safetensors"
    output = tmp_path / "me.safetensors"
    arguments = [f"{source}:{weight}" for source, weight in zip(sources, weights, strict=True)]
    result = run("combine", *arguments, "-o", output, "--dtype", "float32")
    assert result.code == 0, result
    assert_sum(output, dict(zip(sources, weights, strict=True)))
    merged, one = load_lora(output).metadata, load_lora(sources[0]).metadata
    for name in ("trigger_phrase", "recommended_strength", "license", "encoder_license"):
        assert getattr(merged, name) == getattr(one, name), name
    assert (merged.trigger_phrase, merged.recommended_strength) == (PREFIX.rstrip(", "), 0.8)
    assert merged.extra.items() >= one.extra.items() and one.extra["hyperlora.face_pack_license"]
    assert merged.extra["hyperlora.prompt_prefix"] == PREFIX
    assert merged.extra["hyperlora.commercial_use"] == "no"


@pytest.mark.parametrize("command", ["diff", "combine"])
def test_difference_of_two_people_is_a_slider_without_trigger(
    files: Path, run: Any, tmp_path: Path, command: str
) -> None:
    anna, ben = files / "fid.safetensors", files / "ben.safetensors"
    output = tmp_path / "slider.safetensors"
    sources = (anna, ben) if command == "diff" else (f"{anna}:1", f"{ben}:-1")
    result = run(command, *sources, "-o", output, "--dtype", "float32")
    assert result.code == 0, result
    assert_sum(output, {anna: 1.0, ben: -1.0})
    slider = load_lora(output).metadata
    assert slider.trigger_phrase == "" and slider.license == "CC BY-NC 4.0"
    assert slider.recommended_strength == 0.8 and len(slider.reference_sha256) == 2
    assert slider.extra["hyperlora.prompt_prefix"] == PREFIX, "without it the network does nothing"
    assert slider.extra["hyperlora.commercial_use"] == "no"
    mostly = run("combine", f"{anna}:1", f"{ben}:-0.3", "-o", output)
    assert mostly.code == 0 and load_lora(output).metadata.trigger_phrase == PREFIX.rstrip(", ")


def test_headers_that_differ_keep_what_holds_for_the_sum(
    files: Path, run: Any, tmp_path: Path
) -> None:
    file = load_lora(files / "fid.safetensors")
    style = LoraMetadata(
        title="style",
        architecture=file.metadata.architecture,
        trigger_phrase="in ink",
        license="mit",
        extra={
            "hyperlora.commercial_use": "yes",
            "hyperlora.prompt_prefix": "ink, ",
            NEGATIVE_LORA_KEY: "gray",
            NEGATIVE_SHA256_KEY: "0" * 64,
        },
    )
    replace(file.lora, metadata=style).save(tmp_path / "style.safetensors")
    output = tmp_path / "both.safetensors"
    sources = (files / "fid.safetensors", tmp_path / "style.safetensors")
    assert run("combine", *sources, "-o", output).code == 0
    metadata = load_lora(output).metadata
    assert metadata.trigger_phrase == f"{PREFIX.rstrip(', ')}, in ink"
    assert metadata.license == "CC BY-NC 4.0, mit" and metadata.recommended_strength == 1.0
    assert metadata.extra["hyperlora.prompt_prefix"] == f"{PREFIX}ink, "
    assert metadata.extra["hyperlora.commercial_use"] == "no"
    assert not metadata.extra.keys() & {NEGATIVE_LORA_KEY, NEGATIVE_SHA256_KEY}

    save_file(load_file(sources[1]), tmp_path / "silent.safetensors")  # without any metadata
    both = (tmp_path / "style.safetensors", tmp_path / "silent.safetensors")
    assert run("combine", *both, "-o", output).code == 0
    assert load_lora(output).metadata.extra["hyperlora.commercial_use"] == "unknown"
    assert run("combine", both[0], both[0], "-o", output).code == 0
    metadata = load_lora(output).metadata
    assert metadata.extra["hyperlora.commercial_use"] == "yes"
    assert metadata.extra[NEGATIVE_LORA_KEY] == "gray", "its negative file can be combined too"
    assert NEGATIVE_SHA256_KEY not in metadata.extra
