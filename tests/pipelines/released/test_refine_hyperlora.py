"""``--refine-steps`` of HyperLoRA's LoRAs on a tiny SDXL, by the authors' settings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("insightface")

from hyperlora.cli import app
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.encoders.face_crops import crop_for_training
from hyperlora.finetuning import refine, trainer
from hyperlora.finetuning.config import FineTuneConfig, RefineConfig
from hyperlora.finetuning.refine import make_photo_examples, refine_lora
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.generate import stack_views
from hyperlora.pipelines.photo_model import SubjectPhotos
from hyperlora.pipelines.released.cards import find_card
from tests.pipelines.released.tiny_hyperlora import draw_portrait, open_model, save_world
from tests.pipelines.released.tiny_sdxl import RESOLUTION, save_sdxl

PROMPT = "fcsks fxhks fhyks, a portrait photo of a person"
NUM_STEPS = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_world(tmp_path_factory.mktemp("hyperlora"))
    save_sdxl(root / "my-sdxl")
    return root


@pytest.fixture(scope="module")
def base(world: Path) -> DiffusionBase:
    return load_diffusion_base(world / "my-sdxl")


def compute_losses(base: DiffusionBase, lora: LoraWeights, latents: Tensor) -> Tensor:
    """The denoising losses [32] of fixed draws, with the prompt of the training."""
    torch.manual_seed(11)
    conditions = {k: v.expand(32, *v.shape[1:]) for k, v in base.encode_prompts([PROMPT]).items()}
    noise_sample = (torch.rand(32), torch.randn(32, *latents.shape[1:]))
    with torch.no_grad(), base.inject_lora(lora):
        return compute_denoising_loss(
            base.predict, base.noise_scheduler, latents.expand(32, -1, -1, -1), conditions,
            noise_sample=noise_sample,
        )  # fmt: skip


def test_refine_steps_fine_tunes_the_lora_by_the_authors_settings(
    world: Path, base: DiffusionBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[FineTuneConfig, Tensor, Any]] = []
    fine_tune = trainer.fine_tune_loras

    def record(
        base: DiffusionBase, examples: Any, codes: Tensor, decode: Any, config: Any, **options: Any
    ) -> Any:
        calls.append((config, codes.clone(), (examples, options)))
        return fine_tune(base, examples, codes, decode, config, **options)

    monkeypatch.setattr(refine, "fine_tune_loras", record)
    output = tmp_path / "me.safetensors"
    arguments = (
        *("generate", world / "me.png", "--model", world / "HyperLoRA", "-o", output),
        *("--face-pack", world / "antelopev2", "--encoder", world / "clip"),
        *("--base", world / "my-sdxl", "--refine-steps", NUM_STEPS, "--device", "cpu"),
    )
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    ((config, codes, (examples, options)),) = calls
    assert (config.num_steps, config.lr, config.batch_size) == (NUM_STEPS, 1e-4, 4)
    assert options["base_loras"] is None, "the LoRA itself is fine-tuned"
    assert examples.prompts == [[PROMPT]]
    before = open_model(world)([world / "me.png"])
    after = load_lora(output, before.weights.layout)
    torch.testing.assert_close(codes, before.weights.flatten()[None])
    assert {c.split(".")[0] for c in after.weights.layout.components} == {"unet"}
    assert after.weights.layout.rank == before.weights.layout.rank == 2
    assert after.metadata.trigger_phrase == before.metadata.trigger_phrase
    deltas = zip(before.weights.get_delta_weights(), after.weights.get_delta_weights(), strict=True)
    changes = [float((a - b).norm() / b.norm()) for b, a in deltas]
    assert len(changes) == 88 and min(changes) > 1e-4
    latents = examples.latents[0]
    gains = compute_losses(base, before.weights, latents) - compute_losses(
        base, after.weights, latents
    )
    assert gains.mean() > 3 * gains.std() / 32**0.5, "the loss falls, by more than chance"


def test_real_sdxl_trains_at_the_resolution_of_the_authors() -> None:
    for variant in ("fidelity", "edit"):
        config = find_card("hyperlora-sdxl", variant).refine_config
        assert (config.num_steps, config.lr, config.batch_size) == (50, 1e-4, 4)
        assert config.resolution == 768 and not config.is_on_top


@pytest.mark.parametrize(("resolution", "side"), [(16, 8), (32, 16), (768, 16), (None, 16)])
def test_photos_have_the_resolution_of_the_settings(
    base: DiffusionBase, resolution: int | None, side: int
) -> None:
    photos = torch.rand(2, 3, 3, 40, 40)
    examples = make_photo_examples(base, photos, "a", resolution)
    assert examples.latents.shape == (2, 3, 4, side, side)


def test_refining_itself_without_steps_or_rank_keeps_factors(
    world: Path, base: DiffusionBase
) -> None:
    predicted = LoraWeights.stack([open_model(world)([world / "me.png"]).weights])
    photos = torch.rand(1, 1, 3, RESOLUTION, RESOLUTION)
    same = refine_lora(base, predicted, photos, RefineConfig(num_steps=0, is_on_top=False))
    torch.testing.assert_close(same.flatten(), predicted.flatten().float())
    for rank in (1, 5):
        config = RefineConfig(num_steps=2, is_on_top=False, out_rank=rank)
        refined = refine_lora(base, predicted, photos, config)
        singular_values = torch.linalg.svdvals(refined.get_delta_weights()[0][0])
        assert refined.layout.rank == rank
        assert int((singular_values > 1e-6 * singular_values[0]).sum()) == rank, "none is empty"


def test_base_sees_the_faces_of_the_photos(world: Path, base: DiffusionBase) -> None:
    model = open_model(world)
    wide = Image.new("RGB", (900, 500), (10, 200, 30))
    wide.paste(draw_portrait(3, 256), (600, 200))
    close = draw_portrait(4)
    (crop,) = model.crop_for_base([wide, Image.new("RGB", (300, 200))])
    face = model.face_finder.find_face(wide)
    low, high = face.landmarks.min(0), face.landmarks.max(0)
    assert crop.width == crop.height
    assert 1.3 * max(high - low) < crop.width < 1.7 * max(high - low)
    subject = SubjectPhotos.from_images([wide, close], model, base)
    assert subject.base_pixels is not None and len(subject.base_pixels) == 2
    assert (
        SubjectPhotos.from_images([Image.new("RGB", (300, 200))], model, base).base_pixels is None
    )


@pytest.mark.parametrize("position", [(0, 0), (180, 0), (90, 110), (-40, 150)])
def test_crop_for_training_lies_inside_of_the_photo(position: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(1, 256, (220, 260, 3), dtype=np.uint8))
    landmarks = np.array([[0, 0], [80, 110]], np.float32) + np.array(position)
    crop = crop_for_training(photo, landmarks)
    assert crop.size == (165, 165) and np.asarray(crop).min() > 0, "nothing outside is black"
    tall = crop_for_training(photo, np.array([[0, 0], [80, 600]], np.float32))
    assert tall.size == (220, 220)


def test_subjects_with_fewer_faces_repeat_theirs() -> None:
    photos = [
        torch.full((n, 3, 2, 2), float(n)) + torch.arange(n)[:, None, None, None] for n in (3, 2)
    ]
    stacked = stack_views(photos)
    assert stacked[:, :, 0, 0, 0].tolist() == [[3, 4, 5], [2, 3, 2]]
