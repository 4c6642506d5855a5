"""Builds: a plan decides every row; a run may be killed at any moment; packing, reading."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_builder.build.chunk_store import ChunkStore, lock_build
from data_builder.build.make_plan import make_plan
from data_builder.build.plan import Plan, Recipe, read_plan, write_plan
from data_builder.build.run import run_build
from data_builder.build.subject_data import load_subject
from data_builder.build.trainer import ChunkTrainer
from data_builder.cli import app
from data_builder.sources.crops import make_cropper
from data_builder.sources.sources import (
    AvatarSource,
    FolderSource,
    HubSource,
    parse_source,
    source_from_dict,
    source_to_dict,
)
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.merge import compute_relative_error
from hyperlora.lora.weights import LoraWeights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six subjects: some a file, some a folder of two or three."""
    folder, draw = tmp_path_factory.mktemp("photos"), random.Random(0)
    for s in range(6):
        home = folder if s % 2 else folder / f"person-{s}"
        home.mkdir(exist_ok=True)
        for p in range(1 if s % 2 else 2 + s // 4):
            image = Image.new("RGB", (24, 20), tuple(draw.randrange(256) for _ in range(3)))
            image.paste(tuple(draw.randrange(256) for _ in range(3)), (4, 4, 12, 12))
            image.save(home / (f"person-{s}.png" if s % 2 else f"{p}.png"))
    (folder / "person-0" / "0.txt").write_text("{} in a garden")
    return folder


def recipe(bundle: Any, **more: Any) -> Recipe:
    facts = {
        "preset": "attention",
        "rank": 2,
        "finetune_steps": 4,
        "subjects_per_batch": 2,
        "eval_every": 2,
        "lr": 1e-2,
        "storage_dtype": "float32",
    }
    return Recipe(str(bundle.base), **{**facts, **more})


def built(bundle: Any, photos: Path, folder: Path, **more: Any) -> LoraDataset:
    write_plan(make_plan(FolderSource(str(photos)), recipe(bundle, **more)), folder)
    run_build(folder)
    return LoraDataset(folder)


def near(one: LoraWeights, other: LoraWeights) -> bool:
    """But for rounding, which Adam's first steps magnify where a gradient is almost nothing."""
    return compute_relative_error(one, other) < 0.02


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((folder / "chunks").iterdir())}


def test_plan_json_round_trip(bundle: Any, photos: Path) -> None:
    plan = make_plan(
        FolderSource(str(photos)),
        recipe(bundle),
        cropper=make_cropper("none"),
        loras_per_subject=2,
        val_fraction=0.5,
    )
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.fingerprint == plan.fingerprint
    assert len(plan.rows) == 12 and len({row.seed for row in plan.rows}) == 12
    assert {row.split for row in plan.rows} == {"train", "validation"}
    other = make_plan(
        FolderSource(str(photos)),
        recipe(bundle, finetune_steps=5),
        cropper=make_cropper("none"),
        loras_per_subject=2,
        val_fraction=0.5,
    )
    assert other.fingerprint != plan.fingerprint and [r.seed for r in other.rows] == [
        r.seed for r in plan.rows
    ]


def test_run_build_ignores_interruptions_and_batch_size(
    bundle: Any, photos: Path, tmp_path: Path
) -> None:
    whole = built(bundle, photos, tmp_path / "whole")
    assert len(whole) == 6 and whole.records[0].subject == "person-0"
    assert [len(r.reference_sha256) for r in whole.records] == [2, 1, 2, 1, 3, 1]
    interrupted = tmp_path / "interrupted"
    write_plan(read_plan(tmp_path / "whole"), interrupted)
    base = load_diffusion_base(bundle.base)
    chunks = ChunkStore(read_plan(interrupted), interrupted)
    chunks.write_chunk(2, ChunkTrainer(chunks.plan, base).build_chunk(2), 1.0)
    (interrupted / "chunks" / ".000001.safetensors.x.tmp").write_bytes(b"half")
    assert run_build(interrupted) == 4
    assert all_bytes(interrupted) == all_bytes(tmp_path / "whole")
    assert run_build(interrupted) == 0
    one_by_one = built(bundle, photos, tmp_path / "single", subjects_per_batch=1)
    for i in range(6):
        assert near(one_by_one.get_weights(i), whole.get_weights(i))


def test_patience_stops_each_subject_at_its_best(
    bundle: Any, photos: Path, tmp_path: Path
) -> None:
    free = built(bundle, photos, tmp_path / "free", finetune_steps=12, lr=0.3)
    early = built(bundle, photos, tmp_path / "early", finetune_steps=12, lr=0.3, patience=1)
    assert {r.num_steps for r in free.records} == {12}
    assert min(r.num_steps for r in early.records) < 12
    for before, after in zip(early.records, free.records, strict=True):
        assert (
            before.initial_loss == after.initial_loss and before.best_loss >= after.best_loss - 1e-5
        )  # type: ignore[operator]
        assert before.best_loss <= before.initial_loss  # type: ignore[operator]
    alone_ = built(bundle, photos, tmp_path / "alone", finetune_steps=12, lr=0.3, patience=1, subjects_per_batch=1)
    for i in range(6):
        assert alone_.records[i].num_steps == early.records[i].num_steps
        assert near(alone_.get_weights(i), early.get_weights(i))


@pytest.mark.parametrize("space", ["locon", "lidb", "loha", "lokr"])
def test_parametrizations_lower_the_loss(
    bundle: Any, photos: Path, tmp_path: Path, space: str
) -> None:
    made = built(bundle, photos, tmp_path, parametrization=space, rank=4, finetune_steps=30, subjects_per_batch=3)
    assert made.layout.rank == 4 and len(made) == 6
    assert any(s.kernel_size for s in made.layout.targets) == (space == "locon")
    assert all(r.best_loss < r.initial_loss for r in made.records)  # type: ignore[operator]
    assert float(made.get_weights(range(6)).compute_delta_norms().sum(-1).min()) > 0


def test_init_methods_give_expected_codes(bundle: Any, photos: Path, tmp_path: Path) -> None:
    plain = built(bundle, photos, tmp_path / "shared", finetune_steps=2)
    for start, source in (
        ("zero", ""),
        ("mean", str(tmp_path / "shared")),
        ("network", str(bundle.model)),
    ):
        write_plan(
            make_plan(FolderSource(str(photos)), recipe(bundle, init=start, init_from=source)),
            tmp_path / start,
        )
    base, plan = load_diffusion_base(bundle.base), read_plan(tmp_path / "mean")
    start = ChunkTrainer(plan, base).init_codes(plan.get_chunk(0), [])
    mean = plain.get_weights(range(6)).mean()
    for got, expected in zip(
        LoraWeights.unflatten(plain.layout, start)[0].get_delta_weights(),
        mean.get_delta_weights(),
        strict=True,
    ):
        assert torch.allclose(got, expected, atol=1e-6)
    plan = read_plan(tmp_path / "zero")
    own = ChunkTrainer(plan, base).init_codes(plan.get_chunk(0), [])
    assert not torch.equal(own[0], own[1])
    run_build(tmp_path / "network")
    network = LoraDataset(tmp_path / "network")
    assert float(network.get_weights(0).compute_delta_norms().min()) > 0, (
        "a network's LoRA changes every site"
    )
    shared = ChunkTrainer(read_plan(tmp_path / "shared"), base).init_codes(plan.get_chunk(0), [])
    assert torch.equal(shared[0], shared[1])


def test_init_network_keeps_predicted_factors(bundle: Any, photos: Path) -> None:
    """Not only the same ΔW: factors turned by SVD have nothing in common from row to row."""
    plan = make_plan(
        FolderSource(str(photos)), recipe(bundle, init="network", init_from=str(bundle.model))
    )
    farm = ChunkTrainer(plan, load_diffusion_base(bundle.base))
    assert farm.network is not None
    materials = [load_subject(row, farm.source, farm.base, plan.recipe) for row in plan.rows]
    wanted = [farm.network.forward(m.pixels[None]).flatten() for m in materials]
    torch.testing.assert_close(farm.init_codes(plan.rows, materials), torch.cat(wanted))


def test_recipe_options_change_examples_and_rows(bundle: Any, photos: Path, tmp_path: Path) -> None:
    from data_builder.build.subject_data import load_subject, make_class_prompts

    options = {
        "num_class_images": 3,
        "prompt_templates": ("a photo of {}", "{} at sea"),
        "num_crops": 2,
        "num_val_photos": 1,
    }
    plan = make_plan(
        FolderSource(str(photos)),
        recipe(bundle, **options, identifier="ohwx dog", class_noun="a dog"),
    )
    base = load_diffusion_base(bundle.base)
    assert make_class_prompts(plan.recipe) == [
        "a photo of a dog",
        "a dog at sea",
        "a photo of a dog",
    ]
    first = load_subject(plan.rows[0], FolderSource(str(photos)), base, plan.recipe)
    assert first.train_examples.latents.shape[:2] == (1, 2), (
        "one photo learned, twice cropped, under its own caption"
    )
    assert first.val_examples.latents.shape[:2] == (1, 2), (
        "the other photo measures, under both templates"
    )
    one = load_subject(plan.rows[1], FolderSource(str(photos)), base, plan.recipe)
    assert one.train_examples.latents.shape[1] == 4, (
        "a single photo learns and measures: two crops, two templates"
    )
    write_plan(plan, tmp_path)
    run_build(tmp_path)
    stamp = (tmp_path / "class.safetensors").read_bytes()
    without = built(
        bundle,
        photos,
        tmp_path / "without",
        **{**options, "num_class_images": 0},
        identifier="ohwx dog",
    )
    assert not torch.allclose(LoraDataset(tmp_path)[0], without[0])
    (tmp_path / "chunks" / "000001.safetensors").unlink()
    before = all_bytes(tmp_path)
    run_build(tmp_path)
    assert (tmp_path / "class.safetensors").read_bytes() == stamp
    assert all(all_bytes(tmp_path)[name] == data for name, data in before.items())


def test_run_build_supports_bfloat16_and_checkpointing(bundle: Any, photos: Path, tmp_path: Path) -> None:
    plain = built(bundle, photos, tmp_path / "a")
    saving = built(bundle, photos, tmp_path / "b", gradient_checkpointing=True)
    half = built(bundle, photos, tmp_path / "c", dtype="bfloat16", storage_dtype="bfloat16")
    assert torch.allclose(saving[0], plain[0], atol=1e-4)
    assert half[0].dtype == torch.bfloat16 and torch.allclose(half[0].float(), plain[0], atol=0.05)
    assert half.records[0].best_loss < half.records[0].initial_loss * 1.01  # type: ignore[operator]


def test_run_build_supports_sdxl(bundle: Any, photos: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    pipe = StableDiffusionPipeline.from_pretrained(bundle.base)
    torch.manual_seed(6)
    unet = UNet2DConditionModel.from_config(
        pipe.unet.config,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(**pipe.text_encoder.config.to_dict() | {"projection_dim": 16})
    )
    parts = (
        pipe.vae,
        pipe.text_encoder,
        text,
        pipe.tokenizer,
        pipe.tokenizer,
        unet,
        pipe.scheduler,
    )
    xl = StableDiffusionXLPipeline(*parts, add_watermarker=False)
    xl.to(torch.float16).save_pretrained(tmp_path / "tiny" / "xl", variant="fp16")
    facts = {
        "base": str(tmp_path / "tiny" / "xl"),
        "variant": "fp16",
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
    }
    plan = make_plan(
        FolderSource(str(photos)),
        replace(recipe(bundle, finetune_steps=8, num_class_images=2), **facts),
        num_subjects=3,
    )
    write_plan(plan, tmp_path / "build")
    run_build(tmp_path / "build")
    made = LoraDataset(tmp_path / "build")
    assert made.layout.base == "tiny/xl" and len(made) == 3
    assert all(r.best_loss < r.initial_loss for r in made.records)  # type: ignore[operator]


def test_plan_and_run_report_invalid_photos(
    bundle: Any, photos: Path, tmp_path: Path
) -> None:
    import shutil

    mixed = tmp_path / "photos"
    shutil.copytree(photos, mixed)
    (mixed / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (mixed / "empty").mkdir()
    (mixed / "person-0" / "9.jpg").write_bytes(b"no image")
    out = tmp_path / "build"
    arguments = [
        "plan",
        mixed,
        "-o",
        out,
        "--base",
        bundle.base,
        "--finetune-steps",
        2,
        "--subjects-per-batch",
        3,
        "--rank",
        2,
    ]
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    plan = read_plan(out)
    assert len(plan.rows) == 6
    for name in ("broken.png", "empty", "9.jpg"):
        assert sum(name in line for line in plan.skipped) == 1 and name in done.stderr
    Image.new("RGB", (9, 9)).save(mixed / "person-1.png")  # another photo since the plan
    (mixed / "person-3.png").unlink()
    run_build(out)
    assert [r.subject for r in LoraDataset(out).records] == [
        "person-0",
        "person-2",
        "person-4",
        "person-5",
    ]
    shown = CliRunner().invoke(app, ["status", str(out), "--json"])
    found = json.loads(shown.stdout)
    assert (found["num_finished"], found["num_planned"], found["num_rows"]) == (6, 6, 4)
    assert any("another than when the plan was made" in line for line in found["skipped"])
    assert any("person-3.png" in line and "no file" in line for line in found["skipped"])


def test_commands_reject_invalid_arguments(bundle: Any, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "build"
    write_plan(make_plan(FolderSource(str(photos)), recipe(bundle)), out)
    base = ["--base", str(bundle.base)]
    for arguments, sentence in (
        (["plan", "avatars:5-5", "-o", "x"], "avatars:FIRST-LAST"),
        (
            ["plan", str(tmp_path / "nowhere"), "-o", str(tmp_path / "x"), *base],
            "neither a folder of photos nor a",
        ),
        (["plan", str(photos), "-o", str(out), *base], "holds another plan"),
        (
            ["plan", str(photos), "-o", str(tmp_path / "x"), "--prompt-template", "no place"],
            "must name the subject once",
        ),
        (["plan", str(photos), "-o", str(tmp_path / "x"), "--init", "mean"], "--init-from"),
        (
            [
                "plan",
                str(photos),
                "-o",
                str(tmp_path / "x"),
                "--parametrization",
                "lidb",
                "--init",
                "network",
            ],
            "lidb fits its",
        ),
        (["run", str(tmp_path)], "holds no plan.json"),
        (["pack", str(out), "-o", str(tmp_path / "x")], "no chunk"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert sentence in done.stderr and done.stderr.strip().startswith("error: ")
    assert not (tmp_path / "x").exists()
    with lock_build(out), pytest.raises(InvalidArgumentError, match="another run is at work"):
        run_build(out)


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


def test_pack_keeps_rows_in_order(bundle: Any, photos: Path, tmp_path: Path) -> None:
    made = built(bundle, photos, tmp_path / "build", storage_dtype="float16")
    done = CliRunner().invoke(
        app, ["pack", str(tmp_path / "build"), "-o", str(tmp_path / "out"), "--rows-per-shard", "4"]
    )
    assert done.exit_code == 0, done.output
    packed = LoraDataset(tmp_path / "out")
    assert packed.records == made.records and packed.layout == made.layout
    assert torch.equal(packed[:], made[:]) and len(packed.shards) == 2
    assert torch.equal(packed[[5, 0, 4]], torch.stack([made[5], made[0], made[4]]))
    assert torch.equal(packed[-1], made[5])
    (tmp_path / "build" / "chunks" / "000001.safetensors").unlink()
    refused = CliRunner().invoke(
        app, ["pack", str(tmp_path / "build"), "-o", str(tmp_path / "out")]
    )
    assert refused.exit_code == 2 and "1 of 3 chunks are not finished" in refused.stderr
    assert len(LoraDataset(tmp_path / "out")) == 6


def test_sources_round_trip_and_list_subjects(photos: Path, tmp_path: Path) -> None:
    import datasets

    rows = {
        "image": [str(photos / "person-1.png"), str(photos / "person-3.png")] * 2,
        "celeb_id": [7, 8, 7, 9],
        "text": ["a", "b", "c", ""],
    }
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    made.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    nothing = dict.fromkeys(("image_column", "subject_column", "caption_column"))
    for where in ("saved", "parquet"):
        source = parse_source(
            str(tmp_path / where),
            portraits_per_identity=1,
            resolution=16,
            split="train",
            columns=nothing,
        )
        assert isinstance(source, HubSource) and source_from_dict(source_to_dict(source)) == source
        found = list(source.list_subjects([]))
        assert [(s.name, s.photos) for s in found] == [
            ("7", (("0", "a"), ("2", "c"))),
            ("8", (("1", "b"),)),
            ("9", (("3", None),)),
        ]
        image, digest = source.read_photo("2")
        assert image.size == (24, 20) and len(digest) == 64
    people = parse_source(
        "avatars:1000000-1000002",
        portraits_per_identity=3,
        resolution=32,
        split="train",
        columns=nothing,
    )
    assert (
        people == AvatarSource(1_000_000, 1_000_002, 3, 32)
        and source_from_dict(source_to_dict(people)) == people
    )
    assert [s.split for s in people.list_subjects([])] == ["validation"] * 2
    assert people.read_photo("1000000/1")[0].size == (32, 32)


@pytest.mark.slow
def test_killed_run_loses_no_chunk(bundle: Any, photos: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, the last ones after chunks were finished; then to the end."""
    plan = make_plan(
        FolderSource(str(photos)), recipe(bundle, finetune_steps=6, subjects_per_batch=1), loras_per_subject=3
    )
    write_plan(plan, tmp_path / "whole")
    run_build(tmp_path / "whole")
    out = tmp_path / "killed"
    write_plan(plan, out)
    draw, kills = random.Random(1), 0
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-m", "data_builder", "run", str(out)],
            env=environment,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        before = len(ChunkStore(plan, out).list_finished_chunks())
        while child.poll() is None and len(ChunkStore(plan, out).list_finished_chunks()) < min(
            before + 3, plan.num_chunks - 1
        ):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.05))
        kills += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert kills and 0 < len(ChunkStore(plan, out).list_finished_chunks()) < plan.num_chunks
    run_build(out)
    assert all_bytes(out) == all_bytes(tmp_path / "whole")
