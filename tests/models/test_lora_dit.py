"""The diffusion transformer over latents of LoRAs."""

import pytest
import torch

from hyperlora.features import ImageFeatures
from hyperlora.models.lora_dit import LoraDiT, interpolate_noise


@pytest.mark.parametrize("per_token_projections", [False, True])
def test_lora_dit_starts_at_zero_and_learns_conditional_latents(
    per_token_projections: bool,
) -> None:
    torch.manual_seed(0)
    x, photo_features = torch.randn(4, 6, 3), ImageFeatures(torch.randn(4, 1, 5, 12))
    model = LoraDiT(6, 3, 12, 32, 2, 2, per_token_projections)
    assert model(x, torch.rand(4), photo_features).abs().max() == 0
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        t, drop_mask = torch.rand(4), torch.rand(4) < 0.1
        noisy_latents = interpolate_noise(torch.randn_like(x), x, t)
        (model(noisy_latents, t, photo_features, drop_mask) - x).square().mean().backward()
        optimizer.step()
    samples = model.sample(photo_features, torch.randn_like(x), num_inference_steps=10)
    nearest = torch.cdist(samples.flatten(1), x.flatten(1)).argmin(1)
    assert nearest.tolist() == [0, 1, 2, 3]
    noise = torch.randn_like(x)
    guided = model.sample(photo_features, noise, num_inference_steps=4, guidance_scale=1.0000001)
    unguided = model.sample(photo_features, noise, num_inference_steps=4)
    assert torch.allclose(guided, unguided, atol=1e-4)


def test_per_token_projections_are_weights_of_one_token_each() -> None:
    model = LoraDiT(6, 3, 12, 32, 1, 2, per_token_projections=True)
    photo_features = ImageFeatures(torch.randn(1, 1, 5, 12))
    with torch.no_grad():
        model.final_layer.weight[2] += 1  # the network is 0 elsewhere
    output = model(torch.randn(1, 6, 3), torch.rand(1), photo_features)
    assert [bool(token.any()) for token in output[0]] == [False, False, True, False, False, False]
    output.sum().backward()
    assert model.x_embedder.weight.grad is not None
    shared = LoraDiT(6, 3, 12, 32, 1, 2)
    assert shared.x_embedder.weight.shape == (32, 3)


def make_random_dit() -> LoraDiT:
    """A network whose output depends on all its inputs; a new one is 0 everywhere."""
    torch.manual_seed(0)
    model = LoraDiT(6, 3, 12, width=32, depth=2, num_heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_sample_follows_the_formula_of_guidance() -> None:
    """Euler steps on x_uncond + w (x_cond - x_uncond)."""
    model, photo_features = make_random_dit(), ImageFeatures(torch.randn(2, 1, 5, 12))
    noise, scale = torch.randn(2, 6, 3), 2.5
    x_t = noise
    with torch.no_grad():
        for t in (1.0, 0.5):
            times = torch.full((2,), t)
            cond = model(x_t, times, photo_features)
            uncond = model(x_t, times, photo_features, torch.ones(2, dtype=torch.bool))
            velocity = (x_t - (uncond + scale * (cond - uncond))) / t
            x_t = x_t - 0.5 * velocity
    samples = model.sample(photo_features, noise, num_inference_steps=2, guidance_scale=scale)
    torch.testing.assert_close(samples, x_t, atol=1e-5, rtol=1e-4)
    unguided = model.sample(photo_features, noise, num_inference_steps=2)
    assert (samples - unguided).abs().max() > 1e-3


def test_dropped_samples_do_not_see_their_photos() -> None:
    model, x, t = make_random_dit(), torch.randn(2, 6, 3), torch.rand(2)
    drop_mask = torch.tensor([True, False])
    with torch.no_grad():
        first, second = (
            model(x, t, ImageFeatures(torch.randn(2, 1, 5, 12)), drop_mask) for _ in range(2)
        )
    torch.testing.assert_close(first[0], second[0])
    assert (first[1] - second[1]).abs().max() > 1e-3


def test_interpolate_noise_is_clean_at_0_and_noise_at_1() -> None:
    noise, x = torch.randn(3, 6, 3), torch.randn(3, 6, 3)
    noisy = interpolate_noise(noise, x, torch.tensor([0.0, 1.0, 0.25]))
    expected = torch.stack([x[0], noise[1], 0.75 * x[2] + 0.25 * noise[2]])
    torch.testing.assert_close(noisy, expected)


def test_mean_counts_by_the_time_and_not_without_condition() -> None:
    """x̂ = network + t m, where the photos are not dropped."""
    model, photo_features = make_random_dit(), ImageFeatures(torch.randn(2, 1, 5, 12))
    x, t, mean = torch.randn(2, 6, 3), torch.tensor([0.25, 0.5]), torch.randn(2, 6, 3)
    drop_mask = torch.tensor([False, True])
    plain = model(x, t, photo_features, drop_mask)
    output = model(x, t, photo_features, drop_mask, mean)
    torch.testing.assert_close(output[0], plain[0] + 0.25 * mean[0])
    torch.testing.assert_close(output[1], plain[1])


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_sample_of_one_step_adds_the_guided_mean(guidance_scale: float) -> None:
    model, photo_features = make_random_dit(), ImageFeatures(torch.randn(2, 1, 5, 12))
    noise, mean = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    plain = model.sample(photo_features, noise, 1, guidance_scale)
    sample = model.sample(photo_features, noise, 1, guidance_scale, mean)
    torch.testing.assert_close(sample, plain + guidance_scale * mean)
