"""Differential LoRAs are antisymmetric sliders in ordinary files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks.ablations.paired_edit import PairEditConfig, fit_pair_edit
from data_builder.avatars.identity import SPLITS, sample_identity, sample_scene
from data_builder.avatars.rendering import render_portrait
from data_builder.baselines.differential_lora import (
    STRENGTHS,
    DifferentialLoraConfig,
    fit_differential_lora,
)
from data_builder.cli import app
from hyperlora import pretrained
from hyperlora.data.images import stack_images, to_tensor
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.merge import compute_relative_error
from hyperlora.lora.weights import LoraWeights


@pytest.fixture(scope="module")
def base(bundle: Any) -> Any:
    return load_diffusion_base(bundle.base)


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Two pairs: images before, and the same with a bright square."""
    before = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.4
    after = before.clone()
    after[..., 4:12, 4:12] = 0.95
    return before, after


def test_fit_differential_lora_is_antisymmetric(base: Any, pairs: Any) -> None:
    before, after = pairs
    config = DifferentialLoraConfig(rank=2, finetune_steps=5, lr=1e-2)
    forward = fit_differential_lora(base, before, after, config)
    backward = fit_differential_lora(base, after, before, config)
    assert forward.compute_delta_norms().sum() > 0.01
    assert compute_relative_error(backward * -1.0, forward) < 1e-3
    assert forward.layout.rank == 4


def test_fit_pair_edit_moves_predicted_image(base: Any, pairs: Any) -> None:
    """On its own pairs it lowers the loss of the edit, and its negative raises it."""
    before, after = pairs
    edit = fit_pair_edit(
        base, before, after, PairEditConfig(rank=2, finetune_steps=60, lr=2e-2, eta=1.0)
    )
    assert edit.layout.rank == 2 and not edit.batch_shape
    latents = base.encode_images(before)
    x0_offset = base.encode_images(after) - latents
    conditions = base.encode_prompts(["", ""])
    noise_sample = (
        torch.tensor([0.8, 0.9]),
        torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)),
    )

    def compute_loss(lora: Any) -> float:
        with torch.no_grad(), inject_lora(base.denoiser, LoraWeights.stack([lora, lora])):
            losses = compute_denoising_loss(
                base.predict,
                base.noise_scheduler,
                latents,
                conditions,
                noise_sample=noise_sample,
                x0_offset=x0_offset,
            )
        return float(losses.mean())

    assert compute_loss(edit) < compute_loss(edit * 0.0) < compute_loss(edit * -1.0)


def test_fit_differential_lora_makes_a_slider_on_released_base() -> None:
    """Sunglasses become a slider: the evaluator's probability of them rises with the strength."""
    base = load_diffusion_base(pretrained.BASE_DIR)
    classifier = AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR)
    pixels = []
    for seed in SPLITS["train"][:3]:
        person = sample_identity(seed)
        scene = replace(sample_scene(seed, 0), glasses="none", hat="none", style="plain")
        scenes = (scene, replace(scene, glasses="sunglasses"))
        pixels.append(
            torch.stack([to_tensor(render_portrait(person, s), base.resolution) for s in scenes])
        )
    before, after = torch.stack(pixels).unbind(1)
    config = DifferentialLoraConfig(finetune_steps=40, lr=4e-3)
    slider = fit_differential_lora(base, before, after, config)
    class_index = classifier.attributes["glasses"].index("sunglasses")
    probabilities = []
    for strength in (-1.0, 0.0, 1.0):
        prompts = ["a portrait of a person, smiling, blue background"] * 4
        images = generate_images(
            base, prompts, slider * strength, seeds=range(4), num_inference_steps=6
        )
        probabilities.append(
            float(
                classifier(stack_images(images))
                .logits["glasses"]
                .softmax(-1)[:, class_index]
                .mean()
            )
        )
    assert probabilities[0] < probabilities[2]
    assert probabilities[2] > probabilities[1] + 0.1


def test_fit_differential_lora_command_writes_file_and_grid(bundle: Any, tmp_path: Path) -> None:
    for name, shade in (("before", 40), ("after", 200)):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (20, 20), (shade + 10 * i, 90, 60)).save(tmp_path / name / f"{i}.png")
    output_path, grid_path = tmp_path / "change.safetensors", tmp_path / "new" / "grid.png"
    arguments = [
        tmp_path / "before",
        tmp_path / "after",
        "--base",
        bundle.base,
        "-o",
        output_path,
        "--slider-grid",
        grid_path,
    ]
    arguments += ["--finetune-steps", "2", "--format", "kohya"]
    result = CliRunner().invoke(app, ["fit-differential-lora", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    file = load_lora(output_path)
    assert (file.format, file.metadata.title) == ("kohya", "before to after")
    assert Image.open(grid_path).size == (16 * len(STRENGTHS), 16 * 4)


def test_fit_differential_lora_rejects_invalid_pairs(
    base: Any, bundle: Any, pairs: Any, tmp_path: Path
) -> None:
    before, after = pairs
    with pytest.raises(InvalidArgumentError, match="got 2 and 1"):
        fit_differential_lora(base, before, after[:1])
    with pytest.raises(InvalidArgumentError, match="pair 2 is twice the same image"):
        fit_differential_lora(base, before, torch.stack([after[0], before[1]]))
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 30)).save(tmp_path / "b.png")
    output_path = tmp_path / "x.safetensors"
    for arguments, message in (
        (["a.png", "b.png"], "a.png is 20x20, b.png 20x30"),
        (["a.png", "c.png"], "c.png"),
        (["a.png", "."], "two images, or two folders"),
    ):
        paths = [str(tmp_path / name) for name in arguments]
        options = ["--base", str(bundle.base), "-o", str(output_path)]
        result = CliRunner().invoke(app, ["fit-differential-lora", *paths, *options])
        assert result.exit_code == 2
        assert message in result.stderr
    assert not output_path.exists()
