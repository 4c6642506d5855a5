"""Commands of a build report invalid input and keep rows in order; sources list subjects."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_builder.audit.checks import FINDINGS_PATH
from data_builder.build.chunk_store import LOG_FILE, ChunkStore, lock_build
from data_builder.build.make_plan import make_plan
from data_builder.build.plan import PLAN_KEY, Recipe, read_plan, write_plan
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
from hyperlora.data.lora_shards import LoraRecord, serialize_shard
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout, TargetModule


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


@pytest.fixture
def store(photos: Path, tmp_path: Path) -> ChunkStore:
    """A build of two chunks of random rows, of a plan whose base is never loaded."""
    recipe = Recipe(base="none", subjects_per_batch=3)
    write_plan(make_plan(FolderSource(str(photos)), recipe), tmp_path / "build")
    store = ChunkStore(read_plan(tmp_path / "build"), tmp_path / "build")
    layout = LoraLayout((TargetModule("unet.x", 5, 7),), 2, "b")
    for number in range(2):
        rows = store.plan.get_chunk(number)
        records = [LoraRecord(row.subject, row.repetition) for row in rows]
        metadata = {PLAN_KEY: store.plan.fingerprint}
        data = serialize_shard(torch.randn(3, layout.numel), layout, records, metadata)
        store.write_chunk(number, data, 2.0)
    return store


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"[1]",
        b"7",
        b"\xff",
        b"[" * 100_000,
        b'{"chunk": 0, "rows": null, "seconds": 1, "timestamp": 0}',
        b'{"chunk": 0, "rows": 3, "seconds": NaN, "timestamp": 0}',
        b'{"chunk": 0, "rows": 3, "seconds": -9, "timestamp": 0}',
        b'{"chunk": 0, "rows": Infinity, "seconds": 1, "timestamp": 0}',
    ],
)
def test_status_skips_other_lines_of_the_log(store: ChunkStore, line: bytes) -> None:
    log = store.folder / LOG_FILE
    log.write_bytes(line + b"\n" + log.read_bytes() + line)
    result = CliRunner().invoke(app, ["status", str(store.folder), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["loras_per_hour"] == 3600 * 6 / 4


def test_pack_reports_damaged_findings(store: ChunkStore, tmp_path: Path) -> None:
    findings = store.folder / FINDINGS_PATH
    findings.parent.mkdir()
    for content in (b"{}", b"[3]", b"\xff", b"half"):
        findings.write_bytes(content)
        result = CliRunner().invoke(app, ["pack", str(store.folder), "-o", str(tmp_path / "out")])
        assert result.exit_code == 2 and "is damaged" in result.stderr


@pytest.mark.parametrize("damage", [b"\xff" * 100, b"\0\0\0\0"])
def test_pack_refuses_damaged_rows(store: ChunkStore, tmp_path: Path, damage: bytes) -> None:
    path = store.get_path(1)
    arguments = ["pack", str(store.folder), "-o", str(tmp_path / "out"), "--keep-flagged"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    packed = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    data = bytearray(path.read_bytes())
    data[-len(damage) :] = damage
    path.write_bytes(data)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "rows are not those that were written" in result.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == packed


def test_pack_writes_rows_that_are_not_finite_on_demand(store: ChunkStore, tmp_path: Path) -> None:
    shard = store.open_chunk(1)
    rows = shard.rows.clone()
    rows[2, 4] = torch.inf
    metadata = {PLAN_KEY: store.plan.fingerprint}
    store.get_path(1).write_bytes(serialize_shard(rows, shard.layout, shard.records, metadata))
    arguments = ["pack", str(store.folder), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and shard.records[2].subject in result.stderr
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, [*arguments, "--keep-flagged"]).exit_code == 0
    assert len(LoraDataset(tmp_path / "out")) == 6


def test_lock_build_refuses_links(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("important")
    for target in ("notes", "nowhere", ".lock"):
        (tmp_path / ".lock").symlink_to(target)
        with pytest.raises(InvalidArgumentError, match="is a link"), lock_build(tmp_path):
            pass
        (tmp_path / ".lock").unlink()
    assert (tmp_path / "notes").read_text() == "important"
    assert not (tmp_path / "nowhere").exists()


def test_plan_keeps_names_on_their_line(bundle: Any, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes((photos / "person-1.png").read_bytes())
    (folder / "b\nskipped: c.dng").write_bytes(b"raw")
    arguments = ["plan", str(folder), "-o", str(tmp_path / "build"), "--base", str(bundle.base)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert sum(line.startswith("skipped: ") for line in result.stderr.splitlines()) == 1
