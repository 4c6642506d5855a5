"""VAEs of videos with a mean and a deviation per channel: an image is a video of one frame."""

from typing import Any

from torch import Tensor


def encode_frames(vae: Any, pixels: Tensor) -> Tensor:  # noqa: ANN401 - one of several classes
    """Encode pixels to normalized latents, the means of the posterior.

    Args:
        vae: ``AutoencoderKLQwenImage`` or ``AutoencoderKLQwenImage21``.
        pixels: [n, c, h, w] in [-1, 1], on the device where the VAE computes.

    Returns:
        Latents [n, c, h/f, w/f].
    """
    frames = pixels.to(vae.dtype).unsqueeze(2)  # [n, c, 1, h, w]
    raw = vae.encode(frames).latent_dist.mean.squeeze(2)
    mean, std = _get_statistics(vae, raw)
    return (raw - mean) / std


def decode_frames(vae: Any, latents: Tensor) -> Tensor:  # noqa: ANN401 - one of several classes
    """Decode normalized latents to pixels in about [-1, 1]; the reverse of ``encode_frames``.

    Args:
        vae: ``AutoencoderKLQwenImage`` or ``AutoencoderKLQwenImage21``.
        latents: [n, c, h, w].

    Returns:
        Pixels [n, c, f h, f w].
    """
    latents = latents.to(vae.dtype)
    mean, std = _get_statistics(vae, latents)
    return vae.decode((latents * std + mean).unsqueeze(2)).sample.squeeze(2)


def _get_statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - as above
    """Return mean and standard deviation per channel [c, 1, 1], like ``latents``."""
    mean, std = (
        latents.new_tensor(values)[:, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
