"""Latents of drawn portraits, and what the base sees in them: made once and kept beside the images."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.lib.format import open_memmap
from safetensors.torch import load_file
from torch import Tensor

from hyperlora.data.images import sha256_of
from hyperlora.diffusion.diffusion_base import denoiser_encoder, load_base
from hyperlora.encoders.attribute_classifier import photo_encoder
from hyperlora.progress import track


def latents_of(folder: str | Path, vae: str | Path) -> np.ndarray:
    """The scaled mean latents of a folder of drawn pictures, float16 [n, channels, h, w], memory-mapped; encoded on the
    first call for an autoencoder (told apart by its encoder: another decoder leaves them as they are)."""
    images = np.load(Path(folder) / "images.npy", mmap_mode="r")

    def encoder() -> Callable[[int, int], Tensor]:
        model = AutoencoderKL.from_pretrained(vae).eval()

        def encode(start: int, stop: int) -> Tensor:
            pixels = torch.from_numpy(np.array(images[start:stop])).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
            return model.encode(pixels).latent_dist.mean * model.config.scaling_factor

        return encode

    return _kept(Path(folder), f"latents-{_encoding(vae)}", len(images), encoder)


def tokens_of(folder: str | Path, vae: str | Path, base: str | Path) -> np.ndarray:
    """What ``DenoiserEncoder`` of a base says about each portrait, float16 [n, tokens, width], memory-mapped."""
    latents = latents_of(folder, vae)

    def encoder() -> Callable[[int, int], Tensor]:
        model = denoiser_encoder(load_base(base))
        return lambda start, stop: model.from_latents(torch.from_numpy(np.array(latents[start:stop])).float())

    return _kept(Path(folder), f"tokens-{_encoding(vae)}-{_digest(Path(base) / 'unet')}", len(latents), encoder)


def features_of(folder: str | Path, encoder: str, options: dict[str, Any] | None = None) -> np.ndarray:
    """What an encoder (``photo_encoder``) says about each picture, float16 [n, tokens, width], memory-mapped."""
    images = np.load(Path(folder) / "images.npy", mmap_mode="r")

    def made() -> Callable[[int, int], Tensor]:
        model = photo_encoder(encoder, options).eval()

        def encode(start: int, stop: int) -> Tensor:
            pixels = torch.from_numpy(np.array(images[start:stop])).permute(0, 3, 1, 2).float().div_(255)
            return model(pixels[:, None]).tokens[:, 0]

        return encode

    return _kept(Path(folder), f"features-{_digest(encoder)}{_said(options)}", len(images), made)


@torch.no_grad()
def _kept(
    folder: Path, name: str, n: int, encoder: Callable[[], Callable[[int, int], Tensor]], size: int = 32
) -> np.ndarray:
    """``folder/name.npy``, made in batches if it is not there; under its final name only when complete."""
    file = folder / f"{name}.npy"
    if not file.exists():
        encode = encoder()
        partial = file.with_suffix(".part")
        out: np.memmap | None = None
        for i in track(range(0, n, size), name.split("-")[0], "images", n, size):
            made = encode(i, min(i + size, n)).half().numpy()
            if out is None:
                out = open_memmap(partial, "w+", np.float16, (n, *made.shape[1:]))
            out[i : i + len(made)] = made
        assert out is not None
        out.flush()
        partial.rename(file)
    return np.load(file, mmap_mode="r")


def _digest(folder: str | Path) -> str:
    return "".join(sha256_of(f)[:6] for f in sorted(Path(folder).glob("*.safetensors")))


def _encoding(vae: str | Path) -> str:
    """Of what makes scaled latents of pictures."""
    weights = {k: v for file in sorted(Path(vae).glob("*.safetensors")) for k, v in load_file(file).items()}
    encoder = [weights[k] for k in sorted(weights) if k.startswith(("encoder.", "quant_conv."))]
    if not encoder:
        raise ValueError(f"{vae} is no folder of an autoencoder: *.safetensors with an encoder expected")
    scale = json.loads((Path(vae) / "config.json").read_text()).get("scaling_factor")
    numbers = b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in encoder)
    return sha256(numbers + str(scale).encode()).hexdigest()[:6]


def _said(options: dict[str, Any] | None) -> str:
    """Options as a part of a file's name."""
    return "".join(f"-{key}{value}" for key, value in sorted((options or {}).items()))
