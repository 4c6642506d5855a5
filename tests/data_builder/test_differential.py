"""Differential LoRAs: antisymmetric, pointing from before to after, written as an ordinary file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks.ablations.paired_edit import fit_pair_edit
from data_builder.avatars.identity import SPLITS, sample_identity, sample_scene
from data_builder.avatars.rendering import render_portrait
from data_builder.baselines.differential_lora import STRENGTHS, fit_differential_lora
from data_builder.cli import app
from hyperlora import pretrained as bundle_paths
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
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Two pairs: pictures before, and the same with a bright square."""
    before = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.4
    after = before.clone()
    after[..., 4:12, 4:12] = 0.95
    return before, after


def test_the_way_back_is_the_way_negated(base: Any, pictures: Any) -> None:
    before, after = pictures
    there = fit_differential_lora(base, before, after, rank=2, finetune_steps=5, lr=1e-2)
    back = fit_differential_lora(base, after, before, rank=2, finetune_steps=5, lr=1e-2)
    assert there.compute_delta_norms().sum() > 0.01
    assert compute_relative_error(back * -1.0, there) < 1e-3
    assert there.layout.rank == 4


def test_a_lora_fitted_to_pairs_moves_the_expected_picture(base: Any, pictures: Any) -> None:
    """On its own pairs it lowers the loss of making the change, and undoes it when negated."""
    before, after = pictures
    change = fit_pair_edit(base, before, after, rank=2, finetune_steps=60, lr=2e-2, eta=1.0)
    assert change.layout.rank == 2 and not change.batch_shape
    clean = base.encode_images(before)
    moved = base.encode_images(after) - clean
    text = base.encode_prompts(["", ""])
    draw = (
        torch.tensor([0.8, 0.9]),
        torch.randn(clean.shape, generator=torch.Generator().manual_seed(2)),
    )

    def loss(lora: Any) -> float:
        with torch.no_grad(), inject_lora(base.denoiser, LoraWeights.stack([lora, lora])):
            given = compute_denoising_loss(
                base.denoiser,
                base.noise_schedule,
                clean,
                noise_sample=draw,
                x0_offset=moved,
                **text,
            )
        return float(given.mean())

    assert loss(change) < loss(change * 0.0) < loss(change * -1.0)


def test_it_leads_from_before_to_after_on_the_shipped_base() -> None:
    """Sunglasses put on two people become a slider: the evaluator sees more of them the higher the strength."""
    base, reader = (
        load_diffusion_base(bundle_paths.BASE_DIR),
        AttributeClassifier.from_pretrained(bundle_paths.EVALUATOR_DIR),
    )
    pixels = []
    for seed in SPLITS["train"][:3]:
        person, how = (
            sample_identity(seed),
            replace(sample_scene(seed, 0), glasses="none", hat="none", style="plain"),
        )
        both = (how, replace(how, glasses="sunglasses"))
        pixels.append(
            torch.stack([to_tensor(render_portrait(person, s), base.resolution) for s in both])
        )
    before, after = torch.stack(pixels).unbind(1)
    change = fit_differential_lora(base, before, after, finetune_steps=80, lr=2e-3)
    which = reader.attributes["glasses"].index("sunglasses")
    seen = []
    for strength in (-1.0, 0.0, 1.0):
        prompts = ["a portrait of a person, smiling, blue background"] * 8
        drawn = generate_images(
            base, prompts, change * strength, seeds=range(8), num_inference_steps=10
        )
        seen.append(
            float(reader(stack_images(drawn)).logits["glasses"].softmax(-1)[:, which].mean())
        )
    assert seen[0] < seen[2]
    assert seen[2] > seen[1] + 0.1


def test_the_verb_writes_file_and_sheet(bundle: Any, tmp_path: Path) -> None:
    for name, shade in (("before", 40), ("after", 200)):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (20, 20), (shade + 10 * i, 90, 60)).save(tmp_path / name / f"{i}.png")
    out, sheet = tmp_path / "change.safetensors", tmp_path / "new" / "sheet.png"
    arguments = [
        tmp_path / "before",
        tmp_path / "after",
        "--base",
        bundle.base,
        "-o",
        out,
        "--sheet",
        sheet,
    ]
    done = CliRunner().invoke(
        app, ["differential", *map(str, arguments), "--steps", "2", "--format", "kohya"]
    )
    assert done.exit_code == 0, done.output
    file = load_lora(out)
    assert (file.format, file.metadata.title) == ("kohya", "before to after")
    assert Image.open(sheet).size == (16 * len(STRENGTHS), 16 * 4)


def test_says_what_is_wrong(base: Any, bundle: Any, pictures: Any, tmp_path: Path) -> None:
    before, after = pictures
    with pytest.raises(InvalidArgumentError, match="got 2 and 1"):
        fit_differential_lora(base, before, after[:1])
    with pytest.raises(InvalidArgumentError, match="pair 2 is twice the same picture"):
        fit_differential_lora(base, before, torch.stack([after[0], before[1]]))
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 30)).save(tmp_path / "b.png")
    out = tmp_path / "x.safetensors"
    for arguments, sentence in (
        (["a.png", "b.png"], "a.png is 20x20, b.png 20x30"),
        (["a.png", "c.png"], "c.png"),
        (["a.png", "."], "two images, or two folders"),
    ):
        paths = [str(tmp_path / name) for name in arguments]
        done = CliRunner().invoke(
            app, ["differential", *paths, "--base", str(bundle.base), "-o", str(out)]
        )
        assert done.exit_code == 2
        assert sentence in done.stderr
    assert not out.exists()
