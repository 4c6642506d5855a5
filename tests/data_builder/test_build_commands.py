"""Commands of a build report invalid input and keep rows in order; sources list subjects."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_builder.build.chunk_store import lock_build
from data_builder.build.make_plan import make_plan
from data_builder.build.plan import Recipe, read_plan, write_plan
from data_builder.build.run import run_build
from data_builder.cli import app
from data_builder.sources.sources import (
    AvatarSource,
    FolderSource,
    HubSource,
    parse_source,
    source_from_dict,
    source_to_dict,
)
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.errors import InvalidArgumentError


def test_plan_and_run_report_invalid_photos(bundle: Any, photos: Path, tmp_path: Path) -> None:
    import shutil

    mixed_dir = tmp_path / "photos"
    shutil.copytree(photos, mixed_dir)
    (mixed_dir / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (mixed_dir / "empty").mkdir()
    (mixed_dir / "person-0" / "9.jpg").write_bytes(b"no image")
    output_dir = tmp_path / "build"
    arguments = [
        "plan",
        mixed_dir,
        "-o",
        output_dir,
        "--base",
        bundle.base,
        "--finetune-steps",
        2,
        "--subjects-per-batch",
        3,
        "--rank",
        2,
    ]
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    plan = read_plan(output_dir)
    assert len(plan.rows) == 6
    for name in ("broken.png", "empty", "9.jpg"):
        assert sum(name in line for line in plan.skipped) == 1 and name in result.stderr
    Image.new("RGB", (9, 9)).save(mixed_dir / "person-1.png")  # another photo since the plan
    (mixed_dir / "person-3.png").unlink()
    run_build(output_dir)
    assert [r.subject for r in LoraDataset(output_dir).records] == [
        "person-0",
        "person-2",
        "person-4",
        "person-5",
    ]
    status = CliRunner().invoke(app, ["status", str(output_dir), "--json"])
    listed = json.loads(status.stdout)
    assert (listed["num_finished"], listed["num_planned"], listed["num_rows"]) == (6, 6, 4)
    assert any("another than when the plan was made" in line for line in listed["skipped"])
    assert any("person-3.png" in line and "no file" in line for line in listed["skipped"])


def test_commands_reject_invalid_arguments(
    bundle: Any, photos: Path, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    output_dir = tmp_path / "build"
    write_plan(make_plan(FolderSource(str(photos)), make_recipe()), output_dir)
    base = ["--base", str(bundle.base)]
    for arguments, message in (
        (["plan", "avatars:5-5", "-o", "x"], "avatars:FIRST-LAST"),
        (
            ["plan", str(tmp_path / "nowhere"), "-o", str(tmp_path / "x"), *base],
            "neither a folder of photos nor a",
        ),
        (["plan", str(photos), "-o", str(output_dir), *base], "holds another plan"),
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
        (["pack", str(output_dir), "-o", str(tmp_path / "x")], "no chunk"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in result.stderr and result.stderr.strip().startswith("error: ")
    assert not (tmp_path / "x").exists()
    with (
        lock_build(output_dir),
        pytest.raises(InvalidArgumentError, match="another run is at work"),
    ):
        run_build(output_dir)


def test_pack_keeps_rows_in_order(
    tmp_path: Path, build_dataset: Callable[..., LoraDataset]
) -> None:
    dataset = build_dataset(tmp_path / "build", storage_dtype="float16")
    result = CliRunner().invoke(
        app, ["pack", str(tmp_path / "build"), "-o", str(tmp_path / "out"), "--rows-per-shard", "4"]
    )
    assert result.exit_code == 0, result.output
    packed = LoraDataset(tmp_path / "out")
    assert packed.records == dataset.records and packed.layout == dataset.layout
    assert torch.equal(packed[:], dataset[:]) and len(packed.shards) == 2
    assert torch.equal(packed[[5, 0, 4]], torch.stack([dataset[5], dataset[0], dataset[4]]))
    assert torch.equal(packed[-1], dataset[5])
    (tmp_path / "build" / "chunks" / "000001.safetensors").unlink()
    partial = CliRunner().invoke(
        app, ["pack", str(tmp_path / "build"), "-o", str(tmp_path / "out")]
    )
    assert partial.exit_code == 2 and "1 of 3 chunks are not finished" in partial.stderr
    assert len(LoraDataset(tmp_path / "out")) == 6


def test_sources_round_trip_and_list_subjects(photos: Path, tmp_path: Path) -> None:
    import datasets

    rows = {
        "image": [str(photos / "person-1.png"), str(photos / "person-3.png")] * 2,
        "celeb_id": [7, 8, 7, 9],
        "text": ["a", "b", "c", ""],
    }
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    columns = dict.fromkeys(("image_column", "subject_column", "caption_column"))
    for where in ("saved", "parquet"):
        source = parse_source(
            str(tmp_path / where),
            portraits_per_identity=1,
            resolution=16,
            split="train",
            columns=columns,
        )
        assert isinstance(source, HubSource) and source_from_dict(source_to_dict(source)) == source
        listed = list(source.list_subjects([]))
        assert [(s.name, s.photos) for s in listed] == [
            ("7", (("0", "a"), ("2", "c"))),
            ("8", (("1", "b"),)),
            ("9", (("3", None),)),
        ]
        image, digest = source.read_photo("2")
        assert image.size == (24, 20) and len(digest) == 64
    avatars = parse_source(
        "avatars:1000000-1000002",
        portraits_per_identity=3,
        resolution=32,
        split="train",
        columns=columns,
    )
    assert (
        avatars == AvatarSource(1_000_000, 1_000_002, 3, 32)
        and source_from_dict(source_to_dict(avatars)) == avatars
    )
    assert [s.split for s in avatars.list_subjects([])] == ["validation"] * 2
    assert avatars.read_photo("1000000/1")[0].size == (32, 32)
