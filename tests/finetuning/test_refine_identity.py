"""Refining by who is recognised: the LoRA's own pictures get more alike, and an identity belongs to its encoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from data_builder.cli import app
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.noise_schedule import NoiseSchedule
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.encoders.identity_embedder import IDENTITY_EMBEDDER_FILE, IdentityEmbedder
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.finetuning.refine import refine
from hyperlora.finetuning.refine_identity import refine_identity
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.refine_generated import refine_predictions

PROMPTS = ["a b", "a c"]
K = 2


@pytest.fixture
def model(bundle: Any) -> ImageToLora:
    found = ImageToLora.from_pretrained(bundle.model)
    torch.manual_seed(1)
    width = found.encoder.width
    found.identity_embedder = IdentityEmbedder(
        found.encoder, torch.randn(8, width) * width**-0.5, torch.zeros(8)
    )
    return found


@pytest.fixture
def base(bundle: Any) -> DiffusionBase:
    return load_diffusion_base(bundle.base)


@pytest.fixture
def predicted(model: ImageToLora) -> LoraWeights:
    torch.manual_seed(2)
    size = model.layout.numel
    return LoraWeights.unflatten(model.layout, torch.randn(K, size) * 0.05)


@pytest.fixture
def photos(base: DiffusionBase) -> torch.Tensor:
    return torch.rand(
        K, 2, 3, base.resolution, base.resolution, generator=torch.Generator().manual_seed(3)
    )


def likeness(
    base: DiffusionBase, identity: IdentityEmbedder, lora: LoraWeights, photos: torch.Tensor
) -> torch.Tensor:
    """[K], of what the denoiser expects behind noised pictures of its own."""
    who, generator, total = (
        identity.embed_subjects(photos),
        torch.Generator().manual_seed(4),
        torch.zeros(K),
    )
    text = base.encode_prompts([PROMPTS[0]] * K)
    side = base.encode_images(photos[:, 0])
    for step in (300, 600, 800):
        timesteps = torch.full((K,), step)
        schedule = NoiseSchedule(base.noise_scheduler)
        x, _ = schedule.add_noise(side, torch.randn(side.shape, generator=generator), timesteps)
        with inject_lora(base.denoiser, lora), torch.no_grad():
            clean = schedule.predict_x0(x, base.denoiser(x, timesteps, **text).sample, timesteps)
            total += (identity(base.decode_latents(clean)) * who).sum(-1)
    return total / 3


def test_pictures_get_more_alike(
    base: DiffusionBase, model: ImageToLora, predicted: LoraWeights, photos: torch.Tensor
) -> None:
    assert model.identity_embedder is not None
    before = predicted.flatten().clone()
    finer = refine_identity(
        base,
        predicted,
        photos,
        model.identity_embedder,
        PROMPTS,
        num_steps=30,
        lr=2e-2,
        regularization_weight=0.0,
    )
    assert finer.layout == predicted.layout and finer.batch_shape == (K,)
    assert torch.equal(predicted.flatten(), before), "the prediction itself stays as it was"
    gained = likeness(base, model.identity_embedder, finer, photos) - likeness(
        base, model.identity_embedder, predicted, photos
    )
    assert (gained > 0).all(), gained


def test_the_same_arguments_give_the_same_loras(
    base: DiffusionBase, model: ImageToLora, predicted: LoraWeights, photos: torch.Tensor
) -> None:
    assert model.identity_embedder is not None
    once, again = (
        refine_identity(base, predicted, photos, model.identity_embedder, PROMPTS, num_steps=2)
        for _ in range(2)
    )
    assert torch.equal(once.flatten(), again.flatten())
    none = refine_identity(base, predicted, photos, model.identity_embedder, PROMPTS, num_steps=0)
    for got, expected in zip(none.get_delta_weights(), predicted.get_delta_weights(), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def test_a_model_without_an_identity_learns_from_the_photos(
    base: DiffusionBase, model: ImageToLora, predicted: LoraWeights, photos: torch.Tensor
) -> None:
    by_identity = refine_predictions(model, base, predicted, photos, num_steps=2)
    asked_for = refine_predictions(model, base, predicted, photos, num_steps=2, method="photos")
    model.identity_embedder = None
    by_photos = refine_predictions(model, base, predicted, photos, num_steps=2)
    paper = refine(
        base, predicted, photos, num_steps=2, prompt=f"a portrait of {model.trigger_phrase}"
    )
    assert torch.equal(by_photos.flatten(), paper.flatten()) and torch.equal(
        asked_for.flatten(), paper.flatten()
    )
    assert not torch.allclose(by_identity.flatten(), by_photos.flatten(), atol=1e-4)
    with pytest.raises(InvalidArgumentError, match="refine by photos"):
        refine_predictions(model, base, predicted, photos, num_steps=2, method="identity")


def test_saved_and_loaded_it_is_the_same(model: ImageToLora, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = ImageToLora.from_pretrained(tmp_path)
    assert model.identity_embedder is not None and again.identity_embedder is not None
    pictures = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(
        again.identity_embedder(pictures), model.identity_embedder(pictures), atol=1e-2, rtol=1e-2
    )
    (tmp_path / IDENTITY_EMBEDDER_FILE).unlink()
    assert ImageToLora.from_pretrained(tmp_path).identity_embedder is None


def test_an_identity_of_another_encoder_or_a_damaged_one_is_refused(
    model: ImageToLora, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    assert model.identity_embedder is not None
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1.0)
    model.identity_embedder.save(tmp_path)
    with pytest.raises(ModelLoadError, match=r"another photo encoder.*data_builder export-identity"):
        ImageToLora.from_pretrained(tmp_path)
    (tmp_path / IDENTITY_EMBEDDER_FILE).write_bytes(b"nothing")
    with pytest.raises(ModelLoadError, match="damaged"):
        ImageToLora.from_pretrained(tmp_path)


def test_it_comes_from_the_reader_that_the_encoder_comes_from(bundle: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = ImageToLora.from_pretrained(bundle.model)
    spec = model.encoder.config
    reader = AttributeClassifier(
        spec["name"], spec["image_size"], {"hair": ("bob", "afro")}, options=spec["options"]
    )
    model.save_pretrained(tmp_path / "model")
    reader.save_pretrained(tmp_path / "other")
    reader.encoder.load_state_dict(model.encoder.state_dict())
    reader.save_pretrained(tmp_path / "reader")
    run = CliRunner().invoke(
        app, ["identity", str(tmp_path / "reader"), "--model", str(tmp_path / "model")]
    )
    assert run.exit_code == 0 and "64 numbers" in run.output
    assert ImageToLora.from_pretrained(tmp_path / "model").identity_embedder is not None
    run = CliRunner().invoke(
        app, ["identity", str(tmp_path / "other"), "--model", str(tmp_path / "model")]
    )
    assert run.exit_code == 2 and "give the reader that its encoder comes from" in " ".join(
        run.output.split()
    )
