"""Refinement by identity: the identity in images of the LoRA comes nearer to that of the photos."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.noise_schedule import NoiseSchedule
from hyperlora.encoders.identity_embedder import IdentityEmbedder
from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.config import RefineConfig
from hyperlora.finetuning.refine import refine_lora
from hyperlora.finetuning.refine_identity import refine_identity
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.refine_generated import refine_predictions

PROMPTS = ["a b", "a c"]
K = 2


@pytest.fixture
def model(bundle: Any) -> ImageToLora:
    model = ImageToLora.from_pretrained(bundle.model)
    torch.manual_seed(1)
    width = model.encoder.width
    model.identity_embedder = IdentityEmbedder(
        model.encoder, torch.randn(8, width) * width**-0.5, torch.zeros(8)
    )
    return model


@pytest.fixture
def embedder(model: ImageToLora) -> IdentityEmbedder:
    assert model.identity_embedder is not None
    return model.identity_embedder


@pytest.fixture
def base(bundle: Any) -> DiffusionBase:
    return load_diffusion_base(bundle.base)


@pytest.fixture
def prediction(model: ImageToLora) -> LoraWeights:
    torch.manual_seed(2)
    size = model.layout.numel
    return LoraWeights.unflatten(model.layout, torch.randn(K, size) * 0.05)


@pytest.fixture
def photos(base: DiffusionBase) -> Tensor:
    return torch.rand(
        K, 2, 3, base.resolution, base.resolution, generator=torch.Generator().manual_seed(3)
    )


def compute_identity_similarity(
    base: DiffusionBase, embedder: IdentityEmbedder, lora: LoraWeights, photos: Tensor
) -> Tensor:
    """Compute the mean cosine [K] between the photos and predictions of x0 from noisy photos."""
    target_embeds = embedder.embed_subjects(photos)
    schedule = NoiseSchedule(base.noise_scheduler)
    generator, similarity = torch.Generator().manual_seed(4), torch.zeros(K)
    conditions = base.encode_prompts([PROMPTS[0]] * K)
    latents = base.encode_images(photos[:, 0])
    for step in (300, 600, 800):
        timesteps = torch.full((K,), step)
        noise = torch.randn(latents.shape, generator=generator)
        noisy_latents, _ = schedule.add_noise(latents, noise, timesteps)
        with inject_lora(base.denoiser, lora), torch.no_grad():
            model_output = base.predict(noisy_latents, timesteps, conditions)
            pred_x0 = schedule.predict_x0(noisy_latents, model_output, timesteps)
            similarity += (embedder(base.decode_latents(pred_x0)) * target_embeds).sum(-1)
    return similarity / 3


def test_refine_identity_raises_identity_similarity(
    base: DiffusionBase, embedder: IdentityEmbedder, prediction: LoraWeights, photos: Tensor
) -> None:
    prediction_rows = prediction.flatten().clone()
    config = RefineConfig(num_steps=30, lr=2e-2)
    refined = refine_identity(
        base, prediction, photos, embedder, PROMPTS, config, regularization_weight=0.0
    )
    rank = prediction.layout.rank
    assert refined.layout == prediction.layout.with_rank(2 * rank) and refined.batch_shape == (K,)
    assert torch.equal(prediction.flatten(), prediction_rows), (
        "the prediction itself stays as it was"
    )
    gain = compute_identity_similarity(
        base, embedder, refined, photos
    ) - compute_identity_similarity(base, embedder, prediction, photos)
    assert (gain > 0).all(), gain


def test_refine_identity_is_deterministic(
    base: DiffusionBase, embedder: IdentityEmbedder, prediction: LoraWeights, photos: Tensor
) -> None:
    config = RefineConfig(num_steps=2)
    first, second = (
        refine_identity(base, prediction, photos, embedder, PROMPTS, config) for _ in range(2)
    )
    assert torch.equal(first.flatten(), second.flatten())


def test_refine_identity_without_steps_keeps_delta_weights(
    base: DiffusionBase, embedder: IdentityEmbedder, prediction: LoraWeights, photos: Tensor
) -> None:
    config = RefineConfig(num_steps=0)
    refined = refine_identity(base, prediction, photos, embedder, PROMPTS, config)
    deltas = zip(refined.get_delta_weights(), prediction.get_delta_weights(), strict=True)
    for delta, expected in deltas:
        torch.testing.assert_close(delta, expected, atol=1e-4, rtol=1e-3)


def test_refine_predictions_without_embedder_refines_by_photos(
    base: DiffusionBase, model: ImageToLora, prediction: LoraWeights, photos: Tensor
) -> None:
    by_identity = refine_predictions(model, base, prediction, photos, num_steps=2)
    on_request = refine_predictions(model, base, prediction, photos, num_steps=2, method="photos")
    model.identity_embedder = None
    by_photos = refine_predictions(model, base, prediction, photos, num_steps=2)
    prompt = f"a portrait of {model.trigger_phrase}"
    expected = refine_lora(base, prediction, photos, RefineConfig(num_steps=2), prompt=prompt)
    assert torch.equal(by_photos.flatten(), expected.flatten())
    assert torch.equal(on_request.flatten(), expected.flatten())
    distance = (by_identity - by_photos).compute_delta_norms().sum()
    assert distance > 1e-3 * prediction.compute_delta_norms().sum()
    with pytest.raises(InvalidArgumentError, match="refine by photos"):
        refine_predictions(model, base, prediction, photos, num_steps=2, method="identity")


def test_refine_identity_calls_on_step_before_images_and_steps(
    base: DiffusionBase, embedder: IdentityEmbedder, prediction: LoraWeights, photos: Tensor
) -> None:
    steps: list[int] = []
    config = RefineConfig(num_steps=2)
    expected = refine_identity(base, prediction, photos, embedder, PROMPTS, config)
    config = RefineConfig(num_steps=2, on_step=steps.append)
    refined = refine_identity(base, prediction, photos, embedder, PROMPTS, config)
    assert steps == [0] * K * len(PROMPTS) + [1, 2]
    assert refined.layout == expected.layout
    difference = (refined.compute_delta_norms() - expected.compute_delta_norms()).abs().max()
    assert difference < 1e-3 * expected.compute_delta_norms().max()
