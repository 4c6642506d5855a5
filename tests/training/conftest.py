"""A workspace to train in: tiny bases of the real classes, photos of subjects, drawn people, all at the paths that the
configs name."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, bundle: Any) -> Path:
    """``tiny/sd15``, ``tiny/sdxl`` and ``tiny/ip2p`` (16x16 pixels); ``photos/train``, ``photos/validation``,
    ``photos/single``; ``pairs/seed-data-edit``, ``pairs/magic-brush`` (a saved dataset) and ``pairs/validation``."""
    root = tmp_path_factory.mktemp("workspace")
    _save_bases(root / "tiny", bundle.base)
    _save_photos(root / "photos/train", subjects=4, photos=3)
    _save_photos(root / "photos/validation", subjects=2, photos=2)
    _save_photos(root / "photos/single", subjects=4, photos=1)
    _save_pairs(root / "pairs")
    return root


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Lightning leaves its seed in the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def _save_photos(folder: Path, subjects: int, photos: int) -> None:
    """Every subject has a colour of its own, every photo its own noise; the first photos have captions."""
    random = np.random.default_rng(0)
    for s in range(subjects):
        (folder / f"person-{s}").mkdir(parents=True)
        colour = random.uniform(0, 255, 3)
        for p in range(photos):
            pixels = (colour + random.normal(0, 30, (20, 24, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"person-{s}" / f"{p}.png")
        (folder / f"person-{s}" / "0.txt").write_text("a person in the rain")


def _save_bases(folder: Path, base: Path) -> None:
    """As the hub has them: fp16 files under the variant's name."""
    from diffusers import (
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    edits = StableDiffusionInstructPix2PixPipeline.from_pretrained(base.with_name("edit-base"))
    edits.to(torch.float16).save_pretrained(folder / "ip2p")
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.to(torch.float16).save_pretrained(folder / "sd15", variant="fp16")
    torch.manual_seed(6)
    unet = UNet2DConditionModel.from_config(
        pipe.unet.config,
        cross_attention_dim=32,  # both text encoders side by side
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    config = CLIPTextConfig(**pipe.text_encoder.config.to_dict() | {"projection_dim": 16})
    second = CLIPTextModelWithProjection(config)
    xl = StableDiffusionXLPipeline(
        pipe.vae,
        pipe.text_encoder,
        second,
        pipe.tokenizer,
        pipe.tokenizer,
        unet,
        pipe.scheduler,
        add_watermarker=False,
    )
    xl.to(torch.float16).save_pretrained(folder / "sdxl", variant="fp16")


def _save_pairs(folder: Path) -> None:
    """As the public sets have them."""
    from datasets import Dataset

    random = np.random.default_rng(2)
    rows = []
    for _ in range(4):
        before = Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8))
        rows.append((before, before.point(lambda x: 255 - x)))
    (folder / "validation").mkdir(parents=True)
    (folder / "seed-data-edit" / "images").mkdir(parents=True)
    lines = []
    for n, pair in enumerate(rows):
        for side, picture in zip(("before", "after"), pair, strict=True):
            picture.save(folder / "validation" / f"{n}_{side}.png")
            picture.save(folder / "seed-data-edit" / "images" / f"{n}_{side}.png")
        names = {
            k: f"images/{n}_{side}.png"
            for k, side in (("source_image", "before"), ("target_image", "after"))
        }
        lines.append(json.dumps(names | {"instruction": "invert it"}))
    (folder / "seed-data-edit" / "part.jsonl").write_text("\n".join(lines))
    columns = {
        "source_img": [b for b, _ in rows],
        "target_img": [a for _, a in rows],
        "instruction": ["invert"] * 4,
    }
    Dataset.from_dict(columns).save_to_disk(str(folder / "magic-brush"))
