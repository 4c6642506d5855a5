"""``LatentPreviewLoss``: it shows what an autoencoder decodes, as far as a linear map can."""

from typing import Any

import torch
from torch.nn import functional as F

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.training.auxiliary_losses import LatentPreviewLoss


def test_the_preview_is_the_nearest_linear_one(bundle: Any) -> None:
    base = load_diffusion_base(bundle.edit_base)
    torch.manual_seed(0)
    channels = base.pipeline.vae.config.latent_channels
    examples = torch.randn(24, channels, 8, 8)
    preview = LatentPreviewLoss(channels, upscale=1)
    assert not preview.has_kernel
    preview.fit_kernel(base, examples)
    assert preview.has_kernel
    assert preview.kernel.shape == (3, channels, 3, 3)
    pixels = F.adaptive_avg_pool2d(base.decode_latents(examples) * 2 - 1, (8, 8))
    shown = F.conv2d(examples, preview.kernel, padding=1)
    left = pixels - shown
    left = left - left.mean((0, 2, 3), keepdim=True)
    whole = pixels - pixels.mean((0, 2, 3), keepdim=True)
    assert left.square().mean() < 0.9 * whole.square().mean()
    worse = whole - F.conv2d(examples, 1.1 * preview.kernel, padding=1)
    assert (worse - worse.mean((0, 2, 3), keepdim=True)).square().mean() > left.square().mean()


def test_its_error_counts_places_by_their_weight(bundle: Any) -> None:
    base = load_diffusion_base(bundle.edit_base)
    wanted = torch.randn(6, base.pipeline.vae.config.latent_channels, 8, 8)
    preview = LatentPreviewLoss(wanted.shape[1])
    preview.fit_kernel(base, wanted)
    assert preview.kernel.shape[0] == 12
    everywhere = torch.ones(6, 1, 8, 8)
    assert preview.compute_error(wanted, wanted, everywhere).abs().max() == 0
    off = wanted.clone()
    off[:, :, :2] += 1  # only the upper part
    error, lower = preview.compute_error(off, wanted, everywhere), everywhere.clone()
    lower[:, :, :4] = 0
    assert error.min() > 0 and preview.compute_error(off, wanted, lower).abs().max() == 0
    torch.testing.assert_close(preview.compute_error(off, wanted, 3 * everywhere), 3 * error)
