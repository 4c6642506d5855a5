"""A plan decides every row of a build, and a run may be killed at any moment."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_builder.build.chunk_store import ChunkStore
from data_builder.build.make_plan import make_plan
from data_builder.build.plan import Plan, Recipe, read_plan, write_plan
from data_builder.build.run import run_build
from data_builder.build.trainer import ChunkTrainer
from data_builder.sources.crops import make_cropper
from data_builder.sources.sources import (
    FolderSource,
)
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.data.subject_sources import FolderSource as PhotoSource
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.lora.merge import compute_relative_error
from hyperlora.lora.weights import LoraWeights

ROOT = Path(__file__).parents[2]


def is_near(first: LoraWeights, second: LoraWeights) -> bool:
    """Equal up to rounding, which Adam's first steps magnify where a gradient is almost 0."""
    return compute_relative_error(first, second) < 0.02


def test_plan_reads_photos_and_captions_as_training_does(tmp_path: Path) -> None:
    texts = {
        "12_sks dog/a.png": "the dog’s {red|blue} hat, {0}",
        "12_sks dog/b.bmp": "by {} at sea",
        "1_dog/a.TIF": None,
    }
    for i, (name, text) in enumerate(texts.items()):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16), (40 * i, 90, 200)).save(path)
        if text is not None:
            path.with_suffix((".caption", ".TXT")[i]).write_bytes(text.encode("cp1252"))
    (tmp_path / "photos/1_dog/c.dng").write_bytes(b"raw")
    (tmp_path / "photos/1_dog/old/x").mkdir(parents=True)
    Image.new("RGB", (24, 16)).save(tmp_path / "photos/1_dog/old/x/d.png")
    source = PhotoSource(str(tmp_path / "photos"))
    expected = {s.name: [(p.key, p.caption) for p in s.photos] for s in source.list_subjects()}
    plan = make_plan(FolderSource(str(tmp_path / "photos")), Recipe(base="none"))
    assert {row.subject: [(p.ref, p.caption) for p in row.photos] for row in plan.rows} == expected
    assert list(expected) == ["dog", "sks dog"]
    assert {caption for photos in expected.values() for _, caption in photos} == {*texts.values()}
    assert [reason.partition(",")[0] for reason in plan.skipped] == [
        "1 photos skipped (1_dog/c.dng)",
        "1 photos skipped (1_dog/old/x/d.png)",
    ]
    assert source.skip_reasons == list(plan.skipped)


def read_chunks(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((folder / "chunks").iterdir())}


def test_plan_json_round_trip(photos: Path, make_recipe: Callable[..., Recipe]) -> None:
    plan = make_plan(
        FolderSource(str(photos)),
        make_recipe(),
        cropper=make_cropper("none"),
        loras_per_subject=2,
        val_fraction=0.5,
    )
    parsed = Plan.from_json(plan.to_json())
    assert parsed == plan and parsed.fingerprint == plan.fingerprint
    assert len(plan.rows) == 12 and len({row.seed for row in plan.rows}) == 12
    assert {row.split for row in plan.rows} == {"train", "validation"}
    other_plan = make_plan(
        FolderSource(str(photos)),
        make_recipe(finetune_steps=5),
        cropper=make_cropper("none"),
        loras_per_subject=2,
        val_fraction=0.5,
    )
    assert other_plan.fingerprint != plan.fingerprint and [r.seed for r in other_plan.rows] == [
        r.seed for r in plan.rows
    ]


def test_run_build_ignores_interruptions_and_batch_size(
    bundle: Any, tmp_path: Path, build_dataset: Callable[..., LoraDataset]
) -> None:
    whole = build_dataset(tmp_path / "whole")
    assert len(whole) == 6 and whole.records[0].subject == "person-0"
    assert [len(r.reference_sha256) for r in whole.records] == [2, 1, 2, 1, 3, 1]
    interrupted = tmp_path / "interrupted"
    write_plan(read_plan(tmp_path / "whole"), interrupted)
    base = load_diffusion_base(bundle.base)
    chunks = ChunkStore(read_plan(interrupted), interrupted)
    chunks.write_chunk(2, ChunkTrainer(chunks.plan, base).build_chunk(2), 1.0)
    (interrupted / "chunks" / ".000001.safetensors.x.tmp").write_bytes(b"half")
    assert run_build(interrupted) == 4
    assert read_chunks(interrupted) == read_chunks(tmp_path / "whole")
    assert run_build(interrupted) == 0
    single = build_dataset(tmp_path / "single", subjects_per_batch=1)
    for i in range(6):
        assert is_near(single.get_weights(i), whole.get_weights(i))


def test_patience_stops_each_subject_at_its_best(
    tmp_path: Path, build_dataset: Callable[..., LoraDataset]
) -> None:
    unlimited = build_dataset(tmp_path / "free", finetune_steps=12, lr=0.3)
    early = build_dataset(tmp_path / "early", finetune_steps=12, lr=0.3, patience=1)
    assert {r.num_steps for r in unlimited.records} == {12}
    assert min(r.num_steps for r in early.records) < 12
    for before, after in zip(early.records, unlimited.records, strict=True):
        assert (
            before.initial_loss == after.initial_loss and before.best_loss >= after.best_loss - 1e-5
        )  # type: ignore[operator]
        assert before.best_loss <= before.initial_loss  # type: ignore[operator]
    separate = build_dataset(
        tmp_path / "alone", finetune_steps=12, lr=0.3, patience=1, subjects_per_batch=1
    )
    for i in range(6):
        assert separate.records[i].num_steps == early.records[i].num_steps
        assert is_near(separate.get_weights(i), early.get_weights(i))


def test_compute_max_batch_size_fills_the_memory() -> None:
    from data_builder.build.batch_size import compute_max_batch_size

    gib = 2**30
    assert (
        compute_max_batch_size(80 * gib, 8 * gib, 10 * gib) == 31
    )  # 8 + 30 · 2 GiB are 85 % of 80 GiB
    assert (
        compute_max_batch_size(8 * gib, 9 * gib, 12 * gib) == 1
        and compute_max_batch_size(80 * gib, gib, gib + 1) == 256
    )


@pytest.mark.slow
def test_killed_run_loses_no_chunk(
    photos: Path, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    """SIGKILL at random moments, the last ones after chunks were finished; then to the end."""
    plan = make_plan(
        FolderSource(str(photos)),
        make_recipe(finetune_steps=6, subjects_per_batch=1),
        loras_per_subject=3,
    )
    write_plan(plan, tmp_path / "whole")
    run_build(tmp_path / "whole")
    output_dir = tmp_path / "killed"
    write_plan(plan, output_dir)
    rng, num_kills = random.Random(1), 0
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    for _ in range(1):
        child = subprocess.Popen(
            [sys.executable, "-m", "data_builder", "run", str(output_dir)],
            env=environment,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        before = len(ChunkStore(plan, output_dir).list_finished_chunks())
        while child.poll() is None and len(
            ChunkStore(plan, output_dir).list_finished_chunks()
        ) < min(before + 3, plan.num_chunks - 1):
            time.sleep(0.005 if any(output_dir.rglob("*.safetensors")) else 0.1)  # imports first
        time.sleep(rng.uniform(0, 0.05))
        num_kills += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert (
        num_kills and 0 < len(ChunkStore(plan, output_dir).list_finished_chunks()) < plan.num_chunks
    )
    run_build(output_dir)
    assert read_chunks(output_dir) == read_chunks(tmp_path / "whole")
