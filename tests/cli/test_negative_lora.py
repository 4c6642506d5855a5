"""Templates through ``generate``, and the LoRA of the negative branch in ``render``."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.features import ImageFeatures
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.negative_lora import (
    NEGATIVE_LORA_KEY,
    NEGATIVE_SHA256_KEY,
    make_negative_path,
)
from hyperlora.lora.io.safetensors_file import write_bytes_together
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.config import GenerationConfig
from hyperlora.pipelines.generate_folder import generate_folder
from hyperlora.pipelines.image_to_lora import ImageToLora
from tests.pipelines.released.tiny_template import WEIGHT, make_template


def get_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.py").read_bytes()).hexdigest()


def compute_delta(path: Path) -> torch.Tensor:
    return load_lora(path).weights.get_delta_weights()[0]


def expect_delta(color: tuple[int, int, int]) -> torch.Tensor:
    code = WEIGHT @ (torch.tensor(color) / 255 + 0.25)
    return torch.outer(code, code)


def test_generate_writes_both_files_of_a_template(run: Any, tmp_path: Path) -> None:
    folder = make_template(tmp_path / "ZImage-i2L-v2")
    Image.new("RGB", (9, 7), (255, 51, 0)).save(tmp_path / "red.png")
    output = tmp_path / "out" / "style.safetensors"
    arguments = ("generate", tmp_path / "red.png", "--model", folder, "-o", output)
    result = run(*arguments)
    assert result.code == 2 and f"--trust-remote-code {get_digest(folder)}" in result.err
    assert not output.parent.exists()

    result = run(*arguments, "--trust-remote-code", get_digest(folder), "--strength", "0.5")
    assert result.code == 0, result
    negative = output.with_name("style-negative.safetensors")
    assert sorted(output.parent.iterdir()) == [negative, output]
    assert f"{negative}: for the negative branch" in result.out
    torch.testing.assert_close(compute_delta(output), 0.5 * expect_delta((255, 51, 0)))
    torch.testing.assert_close(compute_delta(negative), 0.5 * expect_delta((128, 128, 128)))
    extra = load_lora(output).metadata.extra
    assert extra[NEGATIVE_LORA_KEY] == "gray"
    assert extra[NEGATIVE_SHA256_KEY] == hashlib.sha256(negative.read_bytes()).hexdigest()
    assert NEGATIVE_LORA_KEY not in load_lora(negative).metadata.extra


class NegatingModel(ImageToLora):
    """A model whose negative branch has the LoRA at half the strength, negated."""

    def generate_negative(self, features: ImageFeatures) -> LoraWeights:
        return self.generate_from_features(features) * -0.5


def test_generate_folder_writes_both_files_again_if_one_is_missing(
    bundle: Any, tmp_path: Path
) -> None:
    model = NegatingModel.from_pretrained(str(bundle.model))
    (tmp_path / "people").mkdir()
    Image.new("RGB", (9, 7), (0, 0, 255)).save(tmp_path / "people" / "anna.png")
    output = tmp_path / "out"
    config = GenerationConfig(strength=2.0)
    for _ in range(2):
        (record,) = generate_folder(model, tmp_path / "people", output, config)
        assert record.negative_file == "anna-negative.safetensors"
        files = [output / name for name in ("anna.safetensors", "anna-negative.safetensors")]
        positive, negative = (load_lora(path, model.layout).weights for path in files)
        torch.testing.assert_close(negative.flatten(), (positive * -0.5).flatten())
        files[1].unlink()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generate_folder_overwrites_no_subject_with_the_second_file_of_another(
    bundle: Any, tmp_path: Path, batch_size: int
) -> None:
    model = NegatingModel.from_pretrained(str(bundle.model))
    (tmp_path / "people").mkdir()
    colors = {"anna": (0, 0, 255), "anna-negative": (255, 0, 0), "Ben-NEGATIVE": (0, 99, 0)}
    for name, color in colors.items():
        Image.new("RGB", (9, 7), color).save(tmp_path / "people" / f"{name}.png")
    output = tmp_path / "out"
    folder = tmp_path / "people"
    records = generate_folder(model, folder, output, GenerationConfig(), batch_size=batch_size)
    names = [name for record in records for name in (record.file, record.negative_file) if name]
    files = sorted(path.name.lower() for path in output.glob("*.safetensors"))
    assert len(names) == 6 and sorted(name.lower() for name in names) == files
    for record in records:
        assert record.file is not None and record.negative_file is not None
        positive = load_lora(output / record.file, model.layout).weights
        expected = model(folder / f"{record.subject}.png").weights
        torch.testing.assert_close(positive.flatten(), expected.flatten())
        negative = load_lora(output / record.negative_file, model.layout).weights
        torch.testing.assert_close(negative.flatten(), (expected * -0.5).flatten())
        assert make_negative_path(output / record.file).name == record.negative_file
    stamps = {path: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    generate_folder(model, folder, output, GenerationConfig(), batch_size=batch_size)
    assert stamps == {path: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}

    plain = ImageToLora.from_pretrained(str(bundle.model))
    generate_folder(plain, folder, tmp_path / "plain", GenerationConfig())
    written = {path.stem for path in (tmp_path / "plain").glob("*.safetensors")}
    assert written == set(colors), "a model without second files keeps the names"


def test_files_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "b.safetensors"
    (target / "full").mkdir(parents=True)
    with pytest.raises(OSError, match=r"b\.safetensors"):
        write_bytes_together({tmp_path / "a.safetensors": b"a", target: b"b"})
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


@pytest.fixture(scope="module")
def loras(bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRAs that ask for each rule, large enough to see; ``gray`` has its file."""
    folder = tmp_path_factory.mktemp("loras")
    base = load_diffusion_base(bundle.base)
    lora = ImageToLora.from_pretrained(str(bundle.model), base=base)(bundle.photo) * 3
    for name, rule in (("plain", ""), ("off", "off"), ("gray", "gray"), ("alone", "gray")):
        metadata = LoraMetadata(extra={NEGATIVE_LORA_KEY: rule} if rule else {})
        replace(lora, metadata=metadata).save(folder / f"{name}.safetensors")
    replace(lora * -0.5, metadata=LoraMetadata()).save(folder / "gray-negative.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "options", "expected_options", "sentence"),
    [
        ("off", (), ("--negative-lora", "off"), "no LoRA on the negative branch"),
        ("gray", (), ("--negative-lora", "FOLDER/gray-negative.safetensors"), "has its own LoRA"),
        ("alone", (), (), "alone-negative.safetensors is not here"),
        ("off", ("--negative-lora", "same"), (), ""),
        ("off", ("--gamma", "1.2"), ("--gamma", "1.2"), ""),
    ],
)
@pytest.mark.parametrize("by_tag", [False, True])
def test_render_follows_the_header_of_the_only_lora(
    run: Any, bundle: Any, loras: Path, tmp_path: Path, name: str, options: tuple[str, ...],
    expected_options: tuple[str, ...], sentence: str, by_tag: bool,
) -> None:  # fmt: skip
    def render(file: str, *arguments: str) -> tuple[np.ndarray, str]:
        path = tmp_path / f"{file}.png"
        prompt = f"a man <lora:{file}>" if by_tag else "a man"
        lora = () if by_tag else ("--lora", loras / f"{file}.safetensors")
        arguments = tuple(a.replace("FOLDER", str(loras)) for a in arguments)
        result = run(
            "render", "-o", path, "--prompt", prompt, *lora, "--lora-dir", loras, *arguments,
            "--base", bundle.base, "--steps", 2, "--guidance-scale", 6,
        )  # fmt: skip
        assert result.code == 0, result
        return np.asarray(Image.open(path), int), result.err

    image, notes = render(name, *options)
    expected, _ = render("plain", *expected_options)
    assert np.abs(image - expected).max() <= 1
    assert sentence in notes and notes.count("negative branch") == bool(sentence)
    if expected_options[:1] == ("--negative-lora",):
        assert np.abs(expected - render("plain")[0]).max() > 1


def test_render_follows_no_header_of_several_loras(
    run: Any, bundle: Any, loras: Path, tmp_path: Path
) -> None:
    result = run(
        "render", "-o", tmp_path / "x.png", "--prompt", "a man", "--base", bundle.base,
        "--lora", loras / "off.safetensors", "--lora", loras / "plain.safetensors", "--steps", 1,
    )  # fmt: skip
    assert result.code == 0 and "negative branch" not in result.err
