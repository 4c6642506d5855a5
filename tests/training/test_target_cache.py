"""Cached latents and embeddings are what the base computes, and a changed photo is noticed."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hyperlora.data.photos import FilePhoto
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.training.batches import SubjectBatch
from hyperlora.training.cli import train
from hyperlora.training.datamodules import target_cache
from hyperlora.training.datamodules.photo_folders import PhotoFolderDataModule
from hyperlora.training.datamodules.photo_samples import SampleMaker
from hyperlora.training.datamodules.target_cache import (
    TargetCache,
    TargetCacheConfig,
    TargetJob,
    compute_base_fingerprint,
)
from hyperlora.training.modules.frozen_base import load_training_base
from tests.training.config_rules import make_command
from tests.training.config_stages import read_losses
from tests.training.test_photo_samples import make_sample_config

BASE_OPTIONS = {
    "sd15": {"variant": "fp16", "safety_checker": None, "requires_safety_checker": False},
    "sdxl": {"variant": "fp16", "add_watermarker": False},
}


def make_data(folder: Path, cache: TargetCacheConfig | None, **options: Any) -> Any:
    arguments = {
        "resolution": 16,
        "encoder_size": 12,
        "batch_size": 2,
        "num_targets": 2,
        "num_crops": 3,
        "num_workers": 0,
        **options,
    }
    return PhotoFolderDataModule(str(folder), str(folder), cache=cache, **arguments)


def read_batch(data: PhotoFolderDataModule) -> SubjectBatch:
    return next(iter(data.train_dataloader()))


def forbid_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: object, device: object) -> DiffusionBase:
        raise AssertionError("the base is loaded, though nothing is missing")

    monkeypatch.setattr(target_cache, "load_encoding_base", refuse)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "photos"), [("sd15", "train"), ("sdxl", "single")])
def test_cached_targets_are_what_the_base_computes(
    workspace: Path, tmp_path: Path, name: str, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base_dir = workspace / "photos" / photos, workspace / "tiny" / name
    config = TargetCacheConfig(str(tmp_path), str(base_dir), BASE_OPTIONS[name])
    cached = read_batch(make_data(folder, config))
    live = read_batch(make_data(folder, None))
    assert cached.captions == live.captions
    assert torch.equal(cached.photos, live.photos)
    assert cached.images is None
    base = load_training_base(base_dir, **BASE_OPTIONS[name])
    torch.testing.assert_close(cached.latents, base.encode_images(live.images))
    conditions = base.encode_prompts(live.captions)
    assert cached.conditions.keys() == conditions.keys()
    for key, value in conditions.items():
        torch.testing.assert_close(cached.conditions[key], value)
    forbid_base(monkeypatch)
    assert torch.equal(read_batch(make_data(folder, config)).latents, cached.latents)


@pytest.mark.slow
def test_only_a_changed_photo_is_encoded_again(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(workspace / "photos/train", folder)
    config = TargetCacheConfig(
        str(tmp_path / "cache"), str(workspace / "tiny/sd15"), BASE_OPTIONS["sd15"]
    )
    make_data(folder, config).setup("fit")
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")}
    os.utime(folder / "person-0/0.png")  # touched, but the same
    with pytest.MonkeyPatch.context() as patch:
        forbid_base(patch)
        make_data(folder, config).setup("fit")
    Image.new("RGB", (20, 20), "red").save(folder / "person-1/1.png")
    (folder / "person-2/0.txt").write_text("a person at sea")
    make_data(folder, config).setup("fit")
    new_files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")}
    changed = [path for path, time in new_files.items() if files.get(path) != time]
    assert sorted(path.parent.parent.name for path in changed) == ["16x16-crop0.7", "prompts"]
    forbid_base(monkeypatch)
    make_data(folder, config, num_crops=2).setup("fit")  # fewer crops are there


@pytest.mark.slow
def test_photo_that_cannot_be_read_is_left_out(workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(workspace / "photos/train", folder)
    (folder / "person-0/1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    config = TargetCacheConfig(
        str(tmp_path / "cache"), str(workspace / "tiny/sd15"), BASE_OPTIONS["sd15"]
    )
    data = make_data(folder, config)
    data.setup("fit")
    assert [len(s.photos) for s in data.make_dataset(training=True).subjects] == [2, 3, 3, 3]
    assert any("1 photos left out, 1 because cannot be read" in n for n in data.describe())


def make_job(path: Path, num_crops: int = 2) -> TargetJob:
    def refuse(image: Image.Image, crop_number: int) -> torch.Tensor:
        raise AssertionError

    return TargetJob("ab" * 20, FilePhoto("me", None, path), num_crops, refuse, "8x8")


def test_latents_and_conditions_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "me.png"
    Image.new("RGB", (4, 4)).save(path)
    cache, job = TargetCache(tmp_path / "cache", "f"), make_job(path)
    assert not cache.has_latents(job)
    latents = torch.randn(2, 4, 3, 5, dtype=torch.bfloat16)
    cache.write_latents(job, latents)
    assert cache.has_latents(job)
    assert not cache.has_latents(replace(job, num_crops=3))
    assert not TargetCache(tmp_path / "cache", "g").has_latents(job)
    for k in range(2):
        assert torch.equal(cache.read_latents(job.photo_id, "8x8", k), latents[k])
    conditions = {
        "prompt_embeds": torch.randn(1, 7, 3),
        "prompt_embeds_mask": torch.tensor([[True] * 5 + [False] * 2]),
    }
    assert not cache.has_conditions("a / b")
    cache.write_conditions("a / b", conditions)  # type: ignore[arg-type]
    assert cache.has_conditions("a / b")
    assert all(torch.equal(v, conditions[k]) for k, v in cache.read_conditions("a / b").items())
    path.unlink()
    assert not cache.has_latents(job)


def test_many_writers_never_show_a_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "me.png"
    Image.new("RGB", (4, 4)).save(path)
    cache, job = TargetCache(tmp_path / "cache", "f"), make_job(path)
    latents = torch.randn(2, 4, 64, 64)
    cache.write_latents(job, latents)

    def write_and_read(_: int) -> bool:
        cache.write_latents(job, latents)
        has_latents = cache.has_latents(job)
        return has_latents and torch.equal(cache.read_latents(job.photo_id, "8x8", 1), latents[1])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_read, range(64)))
    assert len([p for p in cache.folder.rglob("*") if p.is_file()]) == 1  # nothing is left behind


def test_fingerprint_is_that_of_encoders(workspace: Path, tmp_path: Path) -> None:
    base_dir = tmp_path / "base"
    shutil.copytree(workspace / "tiny/sd15", base_dir)
    config = TargetCacheConfig("cache", str(base_dir), BASE_OPTIONS["sd15"])
    fingerprint = compute_base_fingerprint(config)
    shutil.copytree(base_dir, tmp_path / "copy")
    assert compute_base_fingerprint(replace(config, base=str(tmp_path / "copy"))) == fingerprint
    shutil.rmtree(base_dir / "unet")  # any denoiser
    assert compute_base_fingerprint(config) == fingerprint
    other_options = {**BASE_OPTIONS["sd15"], "dtype": "bfloat16"}
    assert compute_base_fingerprint(replace(config, base_options=other_options)) != fingerprint
    left_out = {**BASE_OPTIONS["sd15"], "vae": None, "text_encoder": None, "tokenizer": None}
    assert compute_base_fingerprint(replace(config, base_options=left_out)) == fingerprint
    for part in ("vae", "text_encoder"):
        (weights,) = (base_dir / part).glob("*.safetensors")
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        changed = compute_base_fingerprint(config)
        assert changed != fingerprint
        fingerprint = changed
    assert compute_base_fingerprint(replace(config, base="nobody/nothing")) is None


def test_fingerprint_notices_a_change_in_the_middle_of_a_large_file(tmp_path: Path) -> None:
    """As of a LoRA that is merged into an encoder: embeddings and last layer stay."""
    weights = tmp_path / "text_encoder" / "model.safetensors"
    weights.parent.mkdir()
    data = bytearray(8_000_000)
    fingerprints = set()
    for start in (0, 1_000_000, 4_321_000, 7_800_000):
        data[start : start + 150_000] = b"x" * 150_000
        weights.write_bytes(data)
        fingerprints.add(compute_base_fingerprint(TargetCacheConfig("cache", str(tmp_path))))
    assert len(fingerprints) == 4


def test_latents_depend_on_what_found_the_faces() -> None:
    """Crops keep the face: another detector's boxes give other crops."""
    makers = [
        SampleMaker(make_sample_config(face_detector=name)) for name in ("", "buffalo 640", "a 320")
    ]
    settings = [maker.get_cache_settings((16, 8)) for maker in makers]
    assert settings[0] == "16x8-crop0.7"
    assert len(set(settings)) == 3 and all("-faces-" in name for name in settings[1:])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, about so small a training
def test_training_without_vae_and_text_encoder_has_the_same_losses(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    name = "sd15/hypernetwork"
    command = [
        *make_command(name),
        "--trainer.precision=32-true",
        "--model.init_args.base_options.dtype=float32",
        "--data.init_args.folder=photos/single",
    ]
    # noise takes the memory format of the latents: the VAE's is another than that of files

    def encode_images(base: DiffusionBase, images: torch.Tensor) -> torch.Tensor:
        return base.family.encode_images(images).contiguous()

    monkeypatch.setattr(DiffusionBase, "encode_images", encode_images)
    train(command)
    losses = read_losses(name)
    base_options = {**BASE_OPTIONS["sd15"], "dtype": "float32"}
    missing = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    # as the model has them: what it leaves out is needed to fill the cache
    cache = {"folder": "cache", "base": "tiny/sd15", "base_options": base_options | missing}
    train(
        [
            *command,
            f"--model.init_args.base_options={json.dumps(base_options | missing)}",
            f"--data.init_args.cache={json.dumps(cache)}",
        ]
    )
    cached_losses = read_losses(name)
    assert cached_losses.keys() == losses.keys()
    for step, metrics in losses.items():
        assert cached_losses[step]["train/loss"] == pytest.approx(metrics["train/loss"], rel=1e-4)
