"""Audits flag rows that were broken on purpose, and packs leave them out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from data_builder.audit.checks import audit_rows, compute_loss_reductions, read_findings
from data_builder.build.chunk_store import ChunkStore
from data_builder.build.make_plan import make_plan
from data_builder.build.plan import PLAN_KEY, SKIPPED_KEY, Recipe, write_plan
from data_builder.build.run import run_build
from data_builder.cli import app
from data_builder.sources.sources import AvatarSource
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.data.lora_shards import open_shard, serialize_shard

NUM_SUBJECTS = 12


@pytest.fixture(scope="module")
def build(bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve subjects; row 3 is not finite, row 5 is ten times too large, row 7 is row 6 again."""
    folder = tmp_path_factory.mktemp("audited")
    recipe = Recipe(
        str(bundle.base),
        preset="attention",
        rank=2,
        finetune_steps=8,
        subjects_per_batch=4,
        eval_every=4,
        lr=1e-2,
        init="zero",
        storage_dtype="float32",
    )
    plan = make_plan(AvatarSource(0, NUM_SUBJECTS, portraits_per_identity=2, resolution=16), recipe)
    write_plan(plan, folder)
    run_build(folder)
    store = ChunkStore(plan, folder)
    for number in range(3):
        shard = open_shard(store.get_path(number))
        rows = shard.rows.clone()
        for i in range(4):
            row = 4 * number + i
            if row == 3:
                rows[i, 7] = torch.nan
            if row == 5:
                rows[i] *= 10
            if row == 7:
                rows[i] = rows[i - 1]
        metadata = {k: v for k, v in shard.metadata.items() if k in (PLAN_KEY, SKIPPED_KEY)}
        store.get_path(number).write_bytes(
            serialize_shard(rows, shard.layout, shard.records, metadata)
        )
    return folder


def test_audit_rows_flags_broken_rows(build: Path) -> None:
    data = LoraDataset(build)
    scores = {**compute_loss_reductions(data), 10: -0.5}
    findings = audit_rows(data, scores, threshold=-0.1)
    flagged = {i: f.flags for i, f in enumerate(findings) if f.flags}
    assert flagged.keys() == {3, 5, 7, 10}
    assert flagged[3] == ("not finite",) and "is usual" in flagged[5][0]
    assert flagged[7] == ("the same row as person-6",) and "score -0.500" in flagged[10][0]
    assert findings[3].norm is None and findings[0].norm is not None and findings[0].norm > 0


def test_audit_writes_report_and_pack_skips_flagged_rows(build: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app,
        ["audit", str(build), "--evaluator", "none", "--threshold", "-9", "--rows-per-group", "1"],
    )
    assert result.exit_code == 0, result.output
    assert "12 LoRAs, 3 flagged" in result.stdout
    report = (build / "audit" / "index.html").read_text()
    assert all(f"<h2>{name}</h2>" in report for name in ("best", "median", "worst", "flagged"))
    assert report.count("data:image/png;base64,") == 9, "a photo and two pictures of each"
    assert {f.subject for f in read_findings(build) if f.flags} == {
        "person-3",
        "person-5",
        "person-7",
    }
    packed = CliRunner().invoke(app, ["pack", str(build), "-o", str(tmp_path / "out")])
    assert packed.exit_code == 0 and "9 LoRAs" in packed.stdout and "3 left out" in packed.stdout
    data = LoraDataset(tmp_path / "out")
    assert {r.subject for r in data.records} == {f"person-{i}" for i in range(NUM_SUBJECTS)} - {
        "person-3",
        "person-5",
        "person-7",
    }
    assert all(r.score is not None for r in data.records)
    unfiltered = CliRunner().invoke(
        app, ["pack", str(build), "-o", str(tmp_path / "all"), "--keep-flagged"]
    )
    assert unfiltered.exit_code == 0 and len(LoraDataset(tmp_path / "all")) == NUM_SUBJECTS


def test_audit_scores_identity_with_evaluator(build: Path, bundle: Any) -> None:
    arguments = [
        "audit",
        str(build),
        "--evaluator",
        str(bundle.evaluator),
        "--num-scored-rows",
        "4",
        "--rows-per-group",
        "1",
    ]
    result = CliRunner().invoke(app, [*arguments, "--threshold", "-99"])
    assert result.exit_code == 0, result.output
    scored = [f for f in read_findings(build) if f.score is not None]
    assert len(scored) == 4 and "identity" in (build / "audit" / "index.html").read_text()


def test_export_sample_writes_rows_and_recipe(build: Path, tmp_path: Path) -> None:
    from data_builder.build.export_sample import read_recipe

    CliRunner().invoke(
        app,
        ["audit", str(build), "--evaluator", "none", "--threshold", "-9", "--rows-per-group", "0"],
    )
    CliRunner().invoke(app, ["pack", str(build), "-o", str(tmp_path / "out")])
    whole = LoraDataset(tmp_path / "out")
    max_bytes = 24_000 + 6 * whole[0].nbytes
    result = CliRunner().invoke(
        app,
        [
            "export-sample",
            str(tmp_path / "out"),
            "-o",
            str(tmp_path / "few"),
            "--max-bytes",
            str(max_bytes),
        ],
    )
    assert result.exit_code == 0, result.output
    sample = LoraDataset(tmp_path / "few")
    assert (
        1 <= len(sample) < len(whole)
        and sum(f.stat().st_size for f in (tmp_path / "few").iterdir()) <= max_bytes
    )
    assert torch.equal(sample[0], whole[0]) and sample.records[0] == whole.records[0]
    recipe = read_recipe(tmp_path / "few" / "recipe.json")
    assert recipe.finetune_steps == 8 and recipe.base == whole.layout.base
    arguments = [
        "plan",
        "avatars:0-2",
        "-o",
        str(tmp_path / "again"),
        "--recipe",
        str(tmp_path / "few" / "recipe.json"),
    ]
    replanned = CliRunner().invoke(app, [*arguments, "--base", "some/base"])
    assert replanned.exit_code == 0 and "some/base, lora, rank 2, 8 steps" in replanned.stdout
