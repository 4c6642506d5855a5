"""Latents and encoder features of rendered images, computed once and cached beside the images."""

import json
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.lib.format import open_memmap
from safetensors.torch import load_file
from torch import Tensor

from hyperlora.compute import ComputeConfig
from hyperlora.data.images import array_to_tensor, compute_sha256
from hyperlora.diffusion.diffusion_base import load_diffusion_base, make_unet_encoder
from hyperlora.encoders.attribute_classifier import load_image_encoder
from hyperlora.progress import track
from hyperlora.training.modules.options import Options

Encode = Callable[[int, int], Tensor]
"""Features [stop - start, ...] of the images from ``start`` to ``stop``."""


def load_cached_latents(folder: str | Path, vae: str | Path) -> np.ndarray:
    """Load the scaled mean latents of rendered images; encode them on the first call.

    The cache is identified by the autoencoder's encoder, so another decoder keeps it.

    Args:
        folder: Folder with ``images.npy``.
        vae: Folder of the autoencoder.

    Returns:
        float16 [n, c, h, w], memory-mapped.

    Raises:
        ValueError: ``vae`` holds no autoencoder.
    """
    images = np.load(Path(folder) / "images.npy", mmap_mode="r")
    name = f"latents-{_compute_vae_encoder_hash(vae)}"
    make_encode = partial(_make_latent_encode, images, vae)
    return _load_or_compute(Path(folder), name, len(images), make_encode)


def load_cached_unet_features(folder: str | Path, vae: str | Path, base: str | Path) -> np.ndarray:
    """Load the features of a base's UNet for rendered images; compute them on the first call.

    Args:
        folder: Folder with ``images.npy``.
        vae: Folder of the autoencoder.
        base: Folder of the base.

    Returns:
        float16 [n, num_tokens, width], memory-mapped.
    """
    latents = load_cached_latents(folder, vae)
    unet_hash = _compute_weights_hash(Path(base) / "unet")
    name = f"tokens-{_compute_vae_encoder_hash(vae)}-{unet_hash}"
    make_encode = partial(_make_unet_encode, latents, base)
    return _load_or_compute(Path(folder), name, len(latents), make_encode)


def load_cached_features(
    folder: str | Path, encoder: str, encoder_options: Options | None = None
) -> np.ndarray:
    """Load the features of an image encoder for rendered images; compute them on the first call.

    Args:
        folder: Folder with ``images.npy``.
        encoder: Folder or timm id, as ``load_image_encoder`` takes it.
        encoder_options: Its arguments.

    Returns:
        float16 [n, num_tokens, width], memory-mapped.
    """
    images = np.load(Path(folder) / "images.npy", mmap_mode="r")
    name = f"features-{_compute_weights_hash(encoder)}{_format_options(encoder_options)}"
    make_encode = partial(_make_feature_encode, images, encoder, encoder_options)
    return _load_or_compute(Path(folder), name, len(images), make_encode)


def _make_latent_encode(images: np.ndarray, vae: str | Path) -> Encode:
    """Load an autoencoder; return the encoding of ``images`` uint8 [n, size, size, 3]."""
    model = AutoencoderKL.from_pretrained(vae).eval()

    def encode(start: int, stop: int) -> Tensor:
        """Encode images to scaled latents [stop - start, c, h, w]."""
        pixels = torch.from_numpy(np.array(images[start:stop])).permute(0, 3, 1, 2)
        pixels = pixels.float().div_(127.5).sub_(1)  # [n, 3, size, size] in [-1, 1]
        return model.encode(pixels).latent_dist.mean * model.config.scaling_factor

    return encode


def _make_unet_encode(latents: np.ndarray, base: str | Path) -> Encode:
    """Load a base; return the encoding of ``latents`` [n, c, h, w] by its UNet."""
    model = make_unet_encoder(load_diffusion_base(base, ComputeConfig(dtype="float32")))

    def encode(start: int, stop: int) -> Tensor:
        """Encode latents to features [stop - start, num_tokens, width]."""
        return model.encode_latents(torch.from_numpy(np.array(latents[start:stop])).float())

    return encode


def _make_feature_encode(
    images: np.ndarray, encoder: str, encoder_options: Options | None
) -> Encode:
    """Load an image encoder; return the encoding of ``images`` uint8 [n, size, size, 3]."""
    model = load_image_encoder(encoder, encoder_options).eval()

    def encode(start: int, stop: int) -> Tensor:
        """Encode images to features [stop - start, num_tokens, width]."""
        pixels = array_to_tensor(images[start:stop])  # [n, 3, size, size] in [0, 1]
        return model(pixels[:, None]).tokens[:, 0]

    return encode


@torch.no_grad()
def _load_or_compute(
    folder: Path,
    name: str,
    num_images: int,
    make_encode: Callable[[], Encode],
    batch_size: int = 32,
) -> np.ndarray:
    """Load ``folder/name.npy``; if it is missing, compute it and rename it when it is complete."""
    path = folder / f"{name}.npy"
    if not path.exists():
        encode = make_encode()
        partial_path = path.with_suffix(".part")
        array: np.memmap | None = None
        starts = range(0, num_images, batch_size)
        for start in track(starts, name.split("-")[0], "images", num_images, batch_size):
            batch = encode(start, min(start + batch_size, num_images)).half().numpy()
            if array is None:
                array = open_memmap(partial_path, "w+", np.float16, (num_images, *batch.shape[1:]))
            array[start : start + len(batch)] = batch
        assert array is not None
        array.flush()
        partial_path.rename(path)
    return np.load(path, mmap_mode="r")


def _compute_weights_hash(folder: str | Path) -> str:
    return "".join(compute_sha256(f)[:6] for f in sorted(Path(folder).glob("*.safetensors")))


def _compute_vae_encoder_hash(vae: str | Path) -> str:
    """Hash all weights that the scaled latents of images depend on."""
    weights = {
        k: v for file in sorted(Path(vae).glob("*.safetensors")) for k, v in load_file(file).items()
    }
    encoder_weights = [
        weights[k] for k in sorted(weights) if k.startswith(("encoder.", "quant_conv."))
    ]
    if not encoder_weights:
        raise ValueError(
            f"{vae} is no folder of an autoencoder: *.safetensors with an encoder expected"
        )
    scaling_factor = json.loads((Path(vae) / "config.json").read_text()).get("scaling_factor")
    weight_bytes = b"".join(
        x.contiguous().view(torch.uint8).numpy().tobytes() for x in encoder_weights
    )
    return sha256(weight_bytes + str(scaling_factor).encode()).hexdigest()[:6]


def _format_options(options: Options | None) -> str:
    """Format options as a part of a file name."""
    return "".join(f"-{key}{value}" for key, value in sorted((options or {}).items()))
