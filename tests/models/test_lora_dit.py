"""The diffusion transformer over latents of LoRAs."""

import torch

from hyperlora.features import ImageFeatures
from hyperlora.models.lora_dit import LoraDiT, interpolate_noise


def test_lora_dit_starts_at_zero_and_learns_conditional_latents() -> None:
    torch.manual_seed(0)
    x, photo_features = torch.randn(4, 6, 3), ImageFeatures(torch.randn(4, 1, 5, 12))
    model = LoraDiT(6, 3, 12, width=32, depth=2, num_heads=2)
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
