"""A workspace to train in: tiny bases of the real classes, photos of subjects and pairs of images,
all at the paths that the configurations name.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_pipelines import get_tiny_pipeline

TRANSFORMERS = (
    "stable_diffusion_3",
    "flux2",
    "flux2_klein",
    "z_image",
    "qwen_image",
    "qwen_image_edit_plus",
)
"""Tiny pipelines with a transformer that configurations train on."""
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, bundle: Any) -> Path:
    """A folder with ``configs`` and:

    * ``tiny/sd15``, ``tiny/sdxl``, ``tiny/instruct_pix2pix``: bases for 16x16 pixels.
    * ``tiny/NAME`` for each of ``TRANSFORMERS``: bases for 32x32 pixels.
    * ``photos/train``, ``photos/validation``, ``photos/single``: folders of subjects.
    * ``pairs/seed-data-edit``, ``pairs/magic-brush`` (a saved dataset), ``pairs/validation``.
    """
    root = tmp_path_factory.mktemp("workspace")
    (root / "configs").symlink_to(CONFIGS)
    _save_bases(root / "tiny", bundle.base)
    for name in TRANSFORMERS:
        get_tiny_pipeline(name).pipe.save_pretrained(root / "tiny" / name)
    _save_photos(root / "photos/train", num_subjects=4, num_photos=3)
    _save_photos(root / "photos/validation", num_subjects=2, num_photos=2)
    _save_photos(root / "photos/single", num_subjects=4, num_photos=1)
    _save_pairs(root / "pairs")
    return root


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Remove the seed that Lightning leaves in the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def _save_photos(folder: Path, num_subjects: int, num_photos: int) -> None:
    """Every subject has its own color, every photo its own noise; each first photo a caption."""
    random = np.random.default_rng(0)
    for s in range(num_subjects):
        subject_dir = folder / f"person-{s}"
        subject_dir.mkdir(parents=True)
        color = random.uniform(0, 255, 3)
        for p in range(num_photos):
            pixels = (color + random.normal(0, 30, (20, 24, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(subject_dir / f"{p}.png")
        (subject_dir / "0.txt").write_text("a person in the rain")


def _save_bases(folder: Path, base_dir: Path) -> None:
    """As the hub stores them: fp16 files under the variant's name."""
    from diffusers import (
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    edit_pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        base_dir.with_name("edit-base")
    )
    edit_pipeline.to(torch.float16).save_pretrained(folder / "instruct_pix2pix")
    pipeline = StableDiffusionPipeline.from_pretrained(base_dir)
    pipeline.to(torch.float16).save_pretrained(folder / "sd15", variant="fp16")
    torch.manual_seed(6)
    unet = UNet2DConditionModel.from_config(
        pipeline.unet.config,
        cross_attention_dim=32,  # the width of both text encoders together
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    config = CLIPTextConfig(**pipeline.text_encoder.config.to_dict() | {"projection_dim": 16})
    xl_pipeline = StableDiffusionXLPipeline(
        pipeline.vae,
        pipeline.text_encoder,
        CLIPTextModelWithProjection(config),
        pipeline.tokenizer,
        pipeline.tokenizer,
        unet,
        pipeline.scheduler,
        add_watermarker=False,
    )
    xl_pipeline.to(torch.float16).save_pretrained(folder / "sdxl", variant="fp16")


def _save_pairs(folder: Path) -> None:
    """The same four pairs in the formats of the public datasets."""
    from datasets import Dataset

    random = np.random.default_rng(2)
    pairs = []
    for _ in range(4):
        before = Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8))
        pairs.append((before, before.point(lambda x: 255 - x)))
    (folder / "validation").mkdir(parents=True)
    (folder / "seed-data-edit" / "images").mkdir(parents=True)
    lines = []
    for n, pair in enumerate(pairs):
        for side, image in zip(("before", "after"), pair, strict=True):
            image.save(folder / "validation" / f"{n}_{side}.png")
            image.save(folder / "seed-data-edit" / "images" / f"{n}_{side}.png")
        record = {
            "source_image": f"images/{n}_before.png",
            "target_image": f"images/{n}_after.png",
            "instruction": "invert it",
        }
        lines.append(json.dumps(record))
    (folder / "seed-data-edit" / "part.jsonl").write_text("\n".join(lines))
    columns = {
        "source_img": [before for before, _ in pairs],
        "target_img": [after for _, after in pairs],
        "instruction": ["invert"] * 4,
    }
    Dataset.from_dict(columns).save_to_disk(str(folder / "magic-brush"))
