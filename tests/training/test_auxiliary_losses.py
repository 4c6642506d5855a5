"""``LatentPreviewLoss``: its preview is the best linear approximation of the decoder."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.training.auxiliary_losses import LatentPreviewLoss


def test_fit_kernel_finds_the_nearest_linear_preview(bundle: Any) -> None:
    base = load_diffusion_base(bundle.edit_base)
    torch.manual_seed(0)
    channels = base.pipeline.vae.config.latent_channels
    latents = torch.randn(24, channels, 8, 8)
    preview_loss = LatentPreviewLoss(channels, upscale=1)
    assert not preview_loss.has_kernel
    preview_loss.fit_kernel(base, latents)
    assert preview_loss.has_kernel
    assert preview_loss.kernel.shape == (3, channels, 3, 3)
    pixels = F.adaptive_avg_pool2d(base.decode_latents(latents) * 2 - 1, (8, 8))
    residual = pixels - F.conv2d(latents, preview_loss.kernel, padding=1)
    residual = residual - residual.mean((0, 2, 3), keepdim=True)
    centered_pixels = pixels - pixels.mean((0, 2, 3), keepdim=True)
    assert residual.square().mean() < 0.9 * centered_pixels.square().mean()
    other_residual = centered_pixels - F.conv2d(latents, 1.1 * preview_loss.kernel, padding=1)
    other_residual = other_residual - other_residual.mean((0, 2, 3), keepdim=True)
    assert other_residual.square().mean() > residual.square().mean()


@pytest.mark.parametrize("upscale", [1, 2])
def test_kernel_of_a_linear_decoder_is_found_exactly(upscale: int) -> None:
    """The decoder has a constant term, which is no part of the kernel."""
    torch.manual_seed(0)
    kernel = torch.randn(3 * upscale**2, 4, 3, 3) / 10

    def decode(latents: Tensor) -> Tensor:
        pixels = F.pixel_shuffle(F.conv2d(latents, kernel, padding=1), upscale) + 0.7
        images = F.interpolate(pixels, scale_factor=2 / upscale)  # two pixels for each latent
        return images / 2 + 0.5

    latents = torch.randn(24, 4, 6, 8)
    preview_loss = LatentPreviewLoss(4, upscale)
    base: Any = SimpleNamespace(decode_latents=decode)
    preview_loss.fit_kernel(base, latents)
    torch.testing.assert_close(preview_loss.kernel, kernel, atol=1e-5, rtol=1e-4)

    other, weight = torch.randn_like(latents), torch.rand(24, 1, 6, 8)
    expected = F.conv2d(latents - other, kernel, padding=1).square() * weight
    error = preview_loss.compute_error(latents, other, weight)
    torch.testing.assert_close(error, expected.mean((1, 2, 3)), atol=1e-5, rtol=1e-3)


def test_compute_error_scales_with_the_weight_of_each_pixel(bundle: Any) -> None:
    base = load_diffusion_base(bundle.edit_base)
    target_latents = torch.randn(6, base.pipeline.vae.config.latent_channels, 8, 8)
    preview_loss = LatentPreviewLoss(target_latents.shape[1])
    preview_loss.fit_kernel(base, target_latents)
    assert preview_loss.kernel.shape[0] == 12
    weight = torch.ones(6, 1, 8, 8)
    assert preview_loss.compute_error(target_latents, target_latents, weight).abs().max() == 0
    latents = target_latents.clone()
    latents[:, :, :2] += 1  # only the upper part differs
    error = preview_loss.compute_error(latents, target_latents, weight)
    lower_weight = weight.clone()
    lower_weight[:, :, :4] = 0
    assert error.min() > 0
    assert preview_loss.compute_error(latents, target_latents, lower_weight).abs().max() == 0
    torch.testing.assert_close(
        preview_loss.compute_error(latents, target_latents, 3 * weight), 3 * error
    )
