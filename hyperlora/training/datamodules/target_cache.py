"""``TargetCache``: latents of target images and embeddings of prompts, computed once.

With it, training needs neither VAE nor text encoders in memory. The folder is

    FINGERPRINT/latents/SETTINGS/ab/ab12….safetensors    latents [num_crops, c, h, w] of a photo
    FINGERPRINT/prompts/cd/cd34….safetensors             conditions [1, ...] of a prompt

The fingerprint depends on the VAE, the text encoders and the precision of the base. A file is
written beside its place and then renamed, so several processes may fill a cache at once.
"""

import gc
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import uuid4

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from hyperlora.compute import ComputeConfig
from hyperlora.data.photos import Photo
from hyperlora.diffusion.conditions import Conditions, map_tensors
from hyperlora.errors import InvalidArgumentError, InvalidImageError

if TYPE_CHECKING:
    from hyperlora.diffusion.diffusion_base import DiffusionBase

_PROBE_BYTES: Final = 16_384
"""Bytes of a weight file that enter the fingerprint at each of ``_NUM_PROBES`` places."""
_NUM_PROBES: Final = 64
"""Evenly spread over a file: merging a LoRA changes its middle, but neither start nor end."""
_DENOISERS: Final = ("unet", "transformer", "transformer_2")


@dataclass(frozen=True)
class TargetCacheConfig:
    """Where latents and embeddings are kept, and what computes them.

    Attributes:
        folder: Folder of the cache; may be shared by runs.
        base: Folder or hub id of the base, as the model has it.
        base_options: Its ``base_options``, as the model has them. Components that the model leaves
            out (``null``) are loaded to fill the cache.
        batch_size: Images that the VAE encodes at once.
    """

    folder: str
    base: str
    base_options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 4


@dataclass(frozen=True)
class TargetJob:
    """Latents to have of a photo.

    Attributes:
        photo_id: Id of the photo.
        photo: The photo.
        num_crops: Number of its crops.
        make_crop: Makes crop k of the photo, [3, h, w] in [0, 1].
        settings: Size and crop settings of the targets, as text.
    """

    photo_id: str
    photo: Photo
    num_crops: int
    make_crop: Callable[[Image.Image, int], Tensor]
    settings: str


class TargetCache:
    """Latents and embeddings of one base on disk.

    Args:
        folder: Folder of caches.
        fingerprint: Of the base (``compute_base_fingerprint``).
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder = Path(folder) / fingerprint

    def read_latents(self, photo_id: str, settings: str, crop_number: int) -> Tensor:
        """Read the latents of one crop, [c, h, w].

        Args:
            photo_id: Id of the photo.
            settings: Size and crop settings.
            crop_number: Number of the crop.
        """
        with safe_open(self._get_latents_path(photo_id, settings), "pt") as file:
            return cast(Tensor, file.get_slice("latents")[crop_number])

    def write_latents(self, job: TargetJob, latents: Tensor) -> None:
        """Write the latents of all crops of a photo.

        Args:
            job: The photo.
            latents: [num_crops, c, h, w].
        """
        metadata = {"signature": job.photo.signature, "sha256": job.photo.compute_sha256()}
        path = self._get_latents_path(job.photo_id, job.settings)
        _write_atomically(path, {"latents": latents}, metadata)

    def has_latents(self, job: TargetJob) -> bool:
        """Check whether a photo has latents of enough crops and has not changed since."""
        path = self._get_latents_path(job.photo_id, job.settings)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                num_crops = file.get_slice("latents").get_shape()[0]
        except (OSError, SafetensorError):
            return False
        if num_crops < job.num_crops:
            return False
        try:
            if metadata.get("signature") == job.photo.signature:
                return True
            # copied or touched, perhaps: only the content tells
            return metadata.get("sha256") == job.photo.compute_sha256()
        except InvalidImageError:
            return False

    def read_conditions(self, prompt: str) -> Conditions:
        """Read the embeddings [1, ...] of a prompt."""
        return cast(Conditions, load_file(self._get_prompt_path(prompt)))

    def write_conditions(self, prompt: str, conditions: Conditions) -> None:
        """Write the embeddings of a prompt.

        Args:
            prompt: The prompt.
            conditions: [1, ...].
        """
        tensors = cast(dict[str, Tensor], conditions)
        _write_atomically(self._get_prompt_path(prompt), tensors, {"prompt": prompt})

    def has_conditions(self, prompt: str) -> bool:
        """Check whether a prompt has embeddings."""
        return self._get_prompt_path(prompt).is_file()

    def _get_latents_path(self, photo_id: str, settings: str) -> Path:
        return self.folder / "latents" / settings / photo_id[:2] / f"{photo_id}.safetensors"

    def _get_prompt_path(self, prompt: str) -> Path:
        name = sha256(prompt.encode()).hexdigest()
        return self.folder / "prompts" / name[:2] / f"{name}.safetensors"


def make_photo_id(source: str, photo: Photo) -> str:
    """Make an id of a photo that is the same in every run.

    Args:
        source: Name of its source; a folder is resolved.
        photo: The photo.

    Returns:
        40 hexadecimal digits.
    """
    path = Path(source)
    name = str(path.resolve()) if path.exists() else source
    return sha256(f"{name}\0{photo.key}".encode()).hexdigest()[:40]


@torch.no_grad()
def fill_target_cache(
    cache: TargetCache,
    base: "DiffusionBase",
    jobs: Iterable[TargetJob],
    prompts: Sequence[str],
    batch_size: int = 4,
) -> None:
    """Compute what a cache lacks. Photos that cannot be read stay out.

    Args:
        cache: The cache.
        base: With VAE and text encoders.
        jobs: Photos that lack latents.
        prompts: Prompts that lack embeddings.
        batch_size: Images that the VAE encodes at once.
    """
    for prompt in prompts:
        conditions = base.encode_prompts([prompt])
        cache.write_conditions(prompt, map_tensors(_copy_to_cpu, conditions))
    for job in jobs:
        try:
            image = job.photo.read_image()
        except InvalidImageError:
            continue
        crops = torch.stack([job.make_crop(image, k) for k in range(job.num_crops)])
        latents = [base.encode_images(part) for part in crops.split(batch_size)]
        cache.write_latents(job, _copy_to_cpu(torch.cat(latents)))


def load_encoding_base(config: TargetCacheConfig, device: torch.device) -> "DiffusionBase":
    """Load VAE and text encoders of a base, without its denoiser.

    Args:
        config: The base.
        device: Where they compute.

    Returns:
        The base, whose ``predict`` cannot be called.

    Raises:
        ModelLoadError: It cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    from hyperlora.diffusion.diffusion_base import load_diffusion_base

    options = {"dtype": "float32", **_drop_left_out(config.base_options)}
    try:
        components = DiffusionPipeline.load_config(config.base)
    except (OSError, ValueError):  # the base says in a sentence what is wrong
        components = {}
    options |= {name: None for name in _DENOISERS if name in components}
    compute = ComputeConfig(device=str(device), dtype=str(options.pop("dtype")))
    return load_diffusion_base(config.base, compute, **options)


def compute_base_fingerprint(config: TargetCacheConfig) -> str | None:
    """Compute a fingerprint of VAE, text encoders and precision of a base from its files.

    Args:
        config: The base.

    Returns:
        16 hexadecimal digits; None if the base has not been downloaded.
    """
    folder = _find_base_folder(config)
    if folder is None:
        return None
    options = _drop_left_out(config.base_options)
    digest = sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or len(parts) < 2 or not parts[0].startswith(("vae", "text", "tok")):
            continue
        size = path.stat().st_size
        digest.update(f"{'/'.join(parts)}\0{size}\0".encode())
        last_start = max(0, size - _PROBE_BYTES)
        starts = {last_start * i // (_NUM_PROBES - 1) for i in range(_NUM_PROBES)}
        with path.open("rb") as file:
            for start in sorted(starts):
                file.seek(start)
                digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()[:16]


def _drop_left_out(base_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options without encoders that are left out: here they are needed."""
    return {
        name: value
        for name, value in base_options.items()
        if value is not None or not name.startswith(("vae", "text_encoder", "tokenizer"))
    }


def _find_base_folder(config: TargetCacheConfig) -> Path | None:
    """The folder of a base: a local one, or its snapshot in the cache of the hub."""
    folder = Path(config.base)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(
            config.base, "model_index.json", revision=config.base_options.get("revision")
        )
    except HFValidationError as error:
        raise InvalidArgumentError(
            f"there is no base {config.base!r}: give cache.base a folder or a hub id"
        ) from error
    return Path(path).parent if isinstance(path, str) else None


def open_target_cache(
    config: TargetCacheConfig,
    device: torch.device,
    jobs: Sequence[TargetJob],
    prompts: Sequence[str],
    track: Callable[[Sequence[TargetJob]], Iterable[TargetJob]] = iter,
) -> TargetCache:
    """Open a cache and fill what it lacks; the base is loaded only if something is missing.

    Args:
        config: The cache and its base.
        device: Where the base computes.
        jobs: Photos that must have latents.
        prompts: Prompts that must have embeddings.
        track: Shows progress while iterating.

    Returns:
        The cache.
    """
    fingerprint = compute_base_fingerprint(config)
    base = None
    if fingerprint is None:
        base = load_encoding_base(config, device)
        fingerprint = compute_base_fingerprint(config) or base.id.replace("/", "--")
    cache = TargetCache(config.folder, fingerprint)
    missing_jobs = [job for job in jobs if not cache.has_latents(job)]
    missing_prompts = [p for p in dict.fromkeys(prompts) if not cache.has_conditions(p)]
    if missing_jobs or missing_prompts:
        base = base or load_encoding_base(config, device)
        fill_target_cache(cache, base, track(missing_jobs), missing_prompts, config.batch_size)
    del base
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return cache


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _write_atomically(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file so that no reader ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp_path = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    temp_path.write_bytes(save(tensors, dict(metadata)))
    os.replace(temp_path, path)
