"""Datasets of LoRAs: written and read back, at random, by subject; ordinary files collected."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from data_builder.build.import_files import import_lora_files, infer_layout
from hyperlora.data.lora_dataset import LoraDataset, read_table, write_table
from hyperlora.data.lora_shards import LoraRecord, open_shard, serialize_shard
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError, LayoutMismatchError
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights

LAYOUT = LoraLayout(
    (TargetModule("unet.a", 6, 4), TargetModule("unet.conv", 18, 5, (3, 3))), 2, "tiny/base"
)

records = st.builds(
    LoraRecord,
    subject=st.text(st.characters(codec="utf-8"), max_size=12),
    repetition=st.integers(0, 9),
    split=st.sampled_from(["train", "validation", "test"]),
    seed=st.integers(0, 2**48),
    reference_sha256=st.lists(st.text("0123456789abcdef", min_size=8, max_size=8), max_size=3).map(
        tuple
    ),
    num_steps=st.integers(0, 1000),
    loss=st.none() | st.floats(0, 10),
    initial_loss=st.none() | st.floats(0, 10),
    best_loss=st.none() | st.floats(0, 10),
    score=st.none() | st.floats(-1, 1),
)


@settings(max_examples=30, deadline=None)
@given(
    table=st.lists(records, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_open_shard_inverts_serialize_shard(
    tmp_path_factory: Any, table: list[LoraRecord], dtype: torch.dtype
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    rows = torch.randn(len(table), LAYOUT.numel).to(dtype)
    dataset = serialize_shard(rows, LAYOUT, table, {"note": "häh"})
    assert dataset == serialize_shard(rows, LAYOUT, table, {"note": "häh"})
    (folder / "a.safetensors").write_bytes(dataset)
    shard = open_shard(folder / "a.safetensors")
    assert (
        shard.layout == LAYOUT and shard.records == tuple(table) and shard.metadata["note"] == "häh"
    )
    assert torch.equal(shard.rows, rows) and shard.rows.dtype == dtype
    write_table(table, folder / "table.parquet")
    assert read_table(folder / "table.parquet") == table


def write_dataset(folder: Path, sizes: tuple[int, ...] = (3, 1, 4)) -> torch.Tensor:
    rows = torch.randn(sum(sizes), LAYOUT.numel)
    shard_records = [
        LoraRecord(f"person-{i // 2}", repetition=i % 2, split="test" if i > 5 else "train")
        for i in range(sum(sizes))
    ]
    start = 0
    for i, size in enumerate(sizes):
        dataset = serialize_shard(
            rows[start : start + size], LAYOUT, shard_records[start : start + size]
        )
        (folder / f"{i}.safetensors").write_bytes(dataset)
        start += size
    return rows


def test_lora_dataset_reads_rows_and_subjects(tmp_path: Path) -> None:
    rows = write_dataset(tmp_path)
    dataset = LoraDataset(tmp_path)
    assert len(dataset) == 8 and torch.equal(dataset[:], rows)
    assert torch.equal(dataset[[7, 0, 3, 3]], rows[[7, 0, 3, 3]]) and torch.equal(
        dataset[-2], rows[6]
    )
    assert torch.equal(dataset[torch.tensor([4, 2])], rows[[4, 2]]) and torch.equal(
        dataset[1:8:3], rows[1:8:3]
    )
    assert dataset.subjects == [f"person-{i}" for i in range(4)]
    assert (
        dataset.list_subject_rows("person-1") == [2, 3]
        and dataset.list_subject_rows("nobody") == []
    )
    assert torch.equal(dataset.get_weights(5).flatten(), rows[5]) and dataset.get_weights(
        [1, 2]
    ).batch_shape == (2,)
    test_split = LoraDataset(tmp_path, "test")
    assert (
        len(test_split) == 2
        and torch.equal(test_split[:], rows[6:])
        and test_split.list_subject_rows("person-3") == [0, 1]
    )
    loaded = torch.cat(list(DataLoader(dataset, batch_size=3)))
    assert torch.equal(loaded, rows)
    with pytest.raises(IndexError):
        dataset[8]
    dataset[0].zero_()
    assert torch.equal(LoraDataset(tmp_path)[0], rows[0]), "the file is never written to"
    scale = dataset.fit_normalizer()
    assert torch.allclose(scale.normalize(dataset[:]).mean(0), torch.zeros(LAYOUT.numel), atol=1e-5)


def test_lora_dataset_names_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidLoraFileError, match="holds no shard"):
        LoraDataset(tmp_path)
    write_dataset(tmp_path)
    shard_bytes = (tmp_path / "1.safetensors").read_bytes()
    for damaged, sentence in (
        (shard_bytes[:-8], "cut off"),
        (b"x" * 99, "not a safetensors"),
        (b"", "not a safetensors"),
    ):
        (tmp_path / "1.safetensors").write_bytes(damaged)
        with pytest.raises(InvalidLoraFileError, match=sentence):
            LoraDataset(tmp_path)
    (tmp_path / "1.safetensors").write_bytes(shard_bytes.replace(b"tiny/base", b"tiny/best"))
    with pytest.raises(InvalidLoraFileError, match="damaged shard"):
        LoraDataset(tmp_path)
    other_layout = LoraLayout(LAYOUT.targets, 2, "another/base")
    (tmp_path / "1.safetensors").write_bytes(
        serialize_shard(torch.zeros(1, other_layout.numel), other_layout, [LoraRecord("x")])
    )
    with pytest.raises(LayoutMismatchError, match="another/base"):
        LoraDataset(tmp_path)
    (tmp_path / "1.safetensors").write_bytes(shard_bytes)
    write_table([LoraRecord("one")], tmp_path / "table.parquet")
    with pytest.raises(InvalidLoraFileError, match="lists 1 rows, the shards hold 8"):
        LoraDataset(tmp_path)
    (tmp_path / "table.parquet").write_bytes(b"no table")
    with pytest.raises(InvalidLoraFileError, match="no table"):
        LoraDataset(tmp_path)
    save_lora(LoraWeights.zeros(LAYOUT, (), 0.1), tmp_path / "lora.safetensors")
    with pytest.raises(InvalidLoraFileError, match="no shard of a LoRA dataset"):
        open_shard(tmp_path / "lora.safetensors")


def test_import_lora_files_writes_dataset_and_names_unfit_files(
    bundle: Any, tmp_path: Path
) -> None:
    base = load_diffusion_base(bundle.base)
    layout = make_layout({"unet": base.denoiser}, "attention", 2, base.id)
    torch.manual_seed(0)
    loras_by_rank = {
        rank: LoraWeights.unflatten(
            layout.with_rank(rank), torch.randn(layout.with_rank(rank).numel)
        )
        for rank in (1, 2, 4)
    }
    files, out = tmp_path / "files", tmp_path / "out"
    save_lora(
        loras_by_rank[2],
        files / "b-diffusers.safetensors",
        metadata=LoraMetadata(reference_sha256=("ab",)),
    )
    save_lora(loras_by_rank[2], files / "deeper" / "a-kohya.safetensors", format="kohya")
    save_lora(loras_by_rank[1], files / "c-narrow.safetensors")
    save_lora(loras_by_rank[4], files / "d-wide.safetensors")
    conv_layout = make_layout({"unet": base.denoiser}, "attention+conv", 2, base.id)
    save_lora(LoraWeights.zeros(conv_layout, (), 0.1), files / "e-conv.safetensors")
    other_layout = LoraLayout(layout.targets, 2, "someone/else")
    save_lora(LoraWeights.zeros(other_layout, (), 0.1), files / "f-other.safetensors")
    (files / "g-broken.safetensors").write_bytes(b"no LoRA")
    inferred_layout = infer_layout(files, dict(base.modules), base.id)
    assert inferred_layout == layout
    report = import_lora_files(files, out, inferred_layout, rows_per_shard=3)
    dataset = LoraDataset(out)
    assert [r.subject for r in dataset.records] == [
        "b-diffusers",
        "c-narrow",
        "d-wide",
        "deeper/a-kohya",
    ]
    assert dataset.records[0].reference_sha256 == ("ab",) and len(dataset.shards) == 2
    for i, expected in (
        (0, loras_by_rank[2]),
        (1, loras_by_rank[1]),
        (3, loras_by_rank[2]),
        (2, loras_by_rank[4].resize(2)),
    ):
        for actual, expected_delta in zip(
            dataset.get_weights(i).get_delta_weights(), expected.get_delta_weights(), strict=True
        ):
            assert torch.allclose(actual, expected_delta, atol=1e-5)
    assert len(report.warnings) == 1 and "d-wide: rank 4 cut to 2" in report.warnings[0]
    assert [line.split(":")[1].strip() for line in report.errors] == [
        "e-conv",
        "f-other",
        "g-broken",
    ]
    assert "'someone/else'" in report.errors[1]
    with pytest.raises(InvalidArgumentError, match="holds LoRAs already"):
        import_lora_files(files, out, inferred_layout)
    with pytest.raises(InvalidArgumentError, match="no LoRA file"):
        import_lora_files(out / "nothing", tmp_path / "new", inferred_layout)
