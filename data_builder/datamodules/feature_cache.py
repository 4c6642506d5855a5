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

from hyperlora.data.images import compute_sha256
from hyperlora.diffusion.diffusion_base import load_diffusion_base, make_unet_encoder
from hyperlora.encoders.attribute_classifier import load_image_encoder
from hyperlora.progress import track


def load_cached_latents(folder: str | Path, vae: str | Path) -> np.ndarray:
    """The scaled mean latents of a folder of drawn pictures, float16 [n, channels, h, w], memory-mapped; encoded on the
    first call for an autoencoder (told apart by its encoder: another decoder leaves them as they are)."""
    images = np.load(Path(folder) / "images.npy", mmap_mode="r")

    def make_encoder() -> Callable[[int, int], Tensor]:
        model = AutoencoderKL.from_pretrained(vae).eval()

        def encode(start: int, stop: int) -> Tensor:
            pixels = (
                torch.from_numpy(np.array(images[start:stop]))
                .permute(0, 3, 1, 2)
                .float()
                .div_(127.5)
                .sub_(1)
            )
            return model.encode(pixels).latent_dist.mean * model.config.scaling_factor

        return encode

    return _load_or_compute(
        Path(folder), f"latents-{_compute_vae_encoder_hash(vae)}", len(images), make_encoder
    )


def load_cached_unet_features(folder: str | Path, vae: str | Path, base: str | Path) -> np.ndarray:
    """What ``UNetFeatureEncoder`` of a base says about each portrait, float16 [n, tokens, width], memory-mapped."""
    latents = load_cached_latents(folder, vae)

    def make_encoder() -> Callable[[int, int], Tensor]:
        model = make_unet_encoder(load_diffusion_base(base))
        return lambda start, stop: model.encode_latents(
            torch.from_numpy(np.array(latents[start:stop])).float()
        )

    return _load_or_compute(
        Path(folder),
        f"tokens-{_compute_vae_encoder_hash(vae)}-{_compute_weights_hash(Path(base) / 'unet')}",
        len(latents),
        make_encoder,
    )


def load_cached_features(
    folder: str | Path, encoder: str, encoder_options: dict[str, Any] | None = None
) -> np.ndarray:
    """What an encoder (``load_image_encoder``) says about each picture, float16 [n, tokens, width], memory-mapped."""
    images = np.load(Path(folder) / "images.npy", mmap_mode="r")

    def make_encoder() -> Callable[[int, int], Tensor]:
        model = load_image_encoder(encoder, encoder_options).eval()

        def encode(start: int, stop: int) -> Tensor:
            pixels = (
                torch.from_numpy(np.array(images[start:stop])).permute(0, 3, 1, 2).float().div_(255)
            )
            return model(pixels[:, None]).tokens[:, 0]

        return encode

    return _load_or_compute(
        Path(folder),
        f"features-{_compute_weights_hash(encoder)}{_format_options(encoder_options)}",
        len(images),
        make_encoder,
    )


@torch.no_grad()
def _load_or_compute(
    folder: Path,
    name: str,
    num_images: int,
    make_encoder: Callable[[], Callable[[int, int], Tensor]],
    batch_size: int = 32,
) -> np.ndarray:
    """``folder/name.npy``, made in batches if it is not there; under its final name only when complete."""
    path = folder / f"{name}.npy"
    if not path.exists():
        encode = make_encoder()
        partial_path = path.with_suffix(".part")
        array: np.memmap | None = None
        for i in track(
            range(0, num_images, batch_size), name.split("-")[0], "images", num_images, batch_size
        ):
            batch = encode(i, min(i + batch_size, num_images)).half().numpy()
            if array is None:
                array = open_memmap(partial_path, "w+", np.float16, (num_images, *batch.shape[1:]))
            array[i : i + len(batch)] = batch
        assert array is not None
        array.flush()
        partial_path.rename(path)
    return np.load(path, mmap_mode="r")


def _compute_weights_hash(folder: str | Path) -> str:
    return "".join(compute_sha256(f)[:6] for f in sorted(Path(folder).glob("*.safetensors")))


def _compute_vae_encoder_hash(vae: str | Path) -> str:
    """Of what makes scaled latents of pictures."""
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
    scale = json.loads((Path(vae) / "config.json").read_text()).get("scaling_factor")
    weight_bytes = b"".join(
        x.contiguous().view(torch.uint8).numpy().tobytes() for x in encoder_weights
    )
    return sha256(weight_bytes + str(scale).encode()).hexdigest()[:6]


def _format_options(options: dict[str, Any] | None) -> str:
    """Options as a part of a file's name."""
    return "".join(f"-{key}{value}" for key, value in sorted((options or {}).items()))
