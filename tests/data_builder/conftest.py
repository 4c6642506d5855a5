"""Photos of six subjects, and builds of them on the tiny base model."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_builder.build.make_plan import make_plan
from data_builder.build.plan import Recipe, write_plan
from data_builder.build.run import run_build
from data_builder.sources.sources import FolderSource
from hyperlora.data.lora_dataset import LoraDataset


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six subjects: some are a file, some a folder of two or three."""
    folder, rng = tmp_path_factory.mktemp("photos"), random.Random(0)
    for s in range(6):
        subject_dir = folder if s % 2 else folder / f"person-{s}"
        subject_dir.mkdir(exist_ok=True)
        for p in range(1 if s % 2 else 2 + s // 4):
            image = Image.new("RGB", (24, 20), tuple(rng.randrange(256) for _ in range(3)))
            image.paste(tuple(rng.randrange(256) for _ in range(3)), (4, 4, 12, 12))
            image.save(subject_dir / (f"person-{s}.png" if s % 2 else f"{p}.png"))
    (folder / "person-0" / "0.txt").write_text("{} in a garden")
    return folder


@pytest.fixture(scope="module")
def make_recipe(bundle: Any) -> Callable[..., Recipe]:
    """Recipes of a few steps on the tiny base model."""

    def make(**options: Any) -> Recipe:
        defaults = {
            "preset": "attention",
            "rank": 2,
            "finetune_steps": 4,
            "subjects_per_batch": 2,
            "eval_every": 2,
            "lr": 1e-2,
            "storage_dtype": "float32",
        }
        return Recipe(str(bundle.base), **{**defaults, **options})

    return make


@pytest.fixture(scope="module")
def build_dataset(photos: Path, make_recipe: Callable[..., Recipe]) -> Callable[..., LoraDataset]:
    """Plan and run builds of the photos in a folder."""

    def build(folder: Path, **options: Any) -> LoraDataset:
        write_plan(make_plan(FolderSource(str(photos)), make_recipe(**options)), folder)
        run_build(folder)
        return LoraDataset(folder)

    return build
