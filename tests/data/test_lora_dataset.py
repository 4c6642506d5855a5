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
    view=st.integers(0, 9),
    split=st.sampled_from(["train", "validation", "test"]),
    seed=st.integers(0, 2**48),
    images=st.lists(st.text("0123456789abcdef", min_size=8, max_size=8), max_size=3).map(tuple),
    steps=st.integers(0, 1000),
    loss=st.none() | st.floats(0, 10),
    before=st.none() | st.floats(0, 10),
    after=st.none() | st.floats(0, 10),
    score=st.none() | st.floats(-1, 1),
)


@settings(max_examples=30, deadline=None)
@given(
    table=st.lists(records, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_what_is_written_is_read(
    tmp_path_factory: Any, table: list[LoraRecord], dtype: torch.dtype
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    rows = torch.randn(len(table), LAYOUT.numel).to(dtype)
    data = serialize_shard(rows, LAYOUT, table, {"note": "häh"})
    assert data == serialize_shard(rows, LAYOUT, table, {"note": "häh"})
    (folder / "a.safetensors").write_bytes(data)
    shard = open_shard(folder / "a.safetensors")
    assert (
        shard.layout == LAYOUT and shard.records == tuple(table) and shard.metadata["note"] == "häh"
    )
    assert torch.equal(shard.rows, rows) and shard.rows.dtype == dtype
    write_table(table, folder / "table.parquet")
    assert read_table(folder / "table.parquet") == table


def dataset(folder: Path, sizes: tuple[int, ...] = (3, 1, 4)) -> torch.Tensor:
    rows = torch.randn(sum(sizes), LAYOUT.numel)
    who = [
        LoraRecord(f"person-{i // 2}", repetition=i % 2, split="test" if i > 5 else "train")
        for i in range(sum(sizes))
    ]
    first = 0
    for i, size in enumerate(sizes):
        data = serialize_shard(rows[first : first + size], LAYOUT, who[first : first + size])
        (folder / f"{i}.safetensors").write_bytes(data)
        first += size
    return rows


def test_rows_at_random_and_by_subject(tmp_path: Path) -> None:
    rows = dataset(tmp_path)
    data = LoraDataset(tmp_path)
    assert len(data) == 8 and torch.equal(data[:], rows)
    assert torch.equal(data[[7, 0, 3, 3]], rows[[7, 0, 3, 3]]) and torch.equal(data[-2], rows[6])
    assert torch.equal(data[torch.tensor([4, 2])], rows[[4, 2]]) and torch.equal(
        data[1:8:3], rows[1:8:3]
    )
    assert data.subjects == [f"person-{i}" for i in range(4)]
    assert data.list_subject_rows("person-1") == [2, 3] and data.list_subject_rows("nobody") == []
    assert torch.equal(data.get_weights(5).flatten(), rows[5]) and data.get_weights(
        [1, 2]
    ).batch_shape == (2,)
    test = LoraDataset(tmp_path, "test")
    assert (
        len(test) == 2
        and torch.equal(test[:], rows[6:])
        and test.list_subject_rows("person-3") == [0, 1]
    )
    loaded = torch.cat(list(DataLoader(data, batch_size=3)))
    assert torch.equal(loaded, rows)
    with pytest.raises(IndexError):
        data[8]
    data[0].zero_()
    assert torch.equal(LoraDataset(tmp_path)[0], rows[0]), "the file is never written to"
    scale = data.fit_normalizer()
    assert torch.allclose(scale.normalize(data[:]).mean(0), torch.zeros(LAYOUT.numel), atol=1e-5)


def test_says_what_is_wrong_with_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(InvalidLoraFileError, match="holds no shard"):
        LoraDataset(tmp_path)
    dataset(tmp_path)
    whole = (tmp_path / "1.safetensors").read_bytes()
    for damaged, sentence in (
        (whole[:-8], "cut off"),
        (b"x" * 99, "not a safetensors"),
        (b"", "not a safetensors"),
    ):
        (tmp_path / "1.safetensors").write_bytes(damaged)
        with pytest.raises(InvalidLoraFileError, match=sentence):
            LoraDataset(tmp_path)
    (tmp_path / "1.safetensors").write_bytes(whole.replace(b"tiny/base", b"tiny/best"))
    with pytest.raises(InvalidLoraFileError, match="damaged shard"):
        LoraDataset(tmp_path)
    other = LoraLayout(LAYOUT.targets, 2, "another/base")
    (tmp_path / "1.safetensors").write_bytes(
        serialize_shard(torch.zeros(1, other.numel), other, [LoraRecord("x")])
    )
    with pytest.raises(LayoutMismatchError, match="another/base"):
        LoraDataset(tmp_path)
    (tmp_path / "1.safetensors").write_bytes(whole)
    write_table([LoraRecord("one")], tmp_path / "table.parquet")
    with pytest.raises(InvalidLoraFileError, match="lists 1 rows, the shards hold 8"):
        LoraDataset(tmp_path)
    (tmp_path / "table.parquet").write_bytes(b"no table")
    with pytest.raises(InvalidLoraFileError, match="no table"):
        LoraDataset(tmp_path)
    save_lora(LoraWeights.zeros(LAYOUT, (), 0.1), tmp_path / "lora.safetensors")
    with pytest.raises(InvalidLoraFileError, match="no shard of a LoRA dataset"):
        open_shard(tmp_path / "lora.safetensors")


def test_ordinary_files_become_a_dataset_and_unfit_ones_are_named(
    bundle: Any, tmp_path: Path
) -> None:
    base = load_diffusion_base(bundle.base)
    layout = make_layout({"unet": base.denoiser}, "attention", 2, base.id)
    torch.manual_seed(0)
    made = {
        rank: LoraWeights.unflatten(
            layout.with_rank(rank), torch.randn(layout.with_rank(rank).numel)
        )
        for rank in (1, 2, 4)
    }
    files, out = tmp_path / "files", tmp_path / "out"
    save_lora(
        made[2], files / "b-diffusers.safetensors", metadata=LoraMetadata(reference_sha256=("ab",))
    )
    save_lora(made[2], files / "deeper" / "a-kohya.safetensors", format="kohya")
    save_lora(made[1], files / "c-narrow.safetensors")
    save_lora(made[4], files / "d-wide.safetensors")
    fewer = make_layout({"unet": base.denoiser}, "attention+conv", 2, base.id)
    save_lora(LoraWeights.zeros(fewer, (), 0.1), files / "e-conv.safetensors")
    other = LoraLayout(layout.targets, 2, "someone/else")
    save_lora(LoraWeights.zeros(other, (), 0.1), files / "f-other.safetensors")
    (files / "g-broken.safetensors").write_bytes(b"no LoRA")
    found = infer_layout(files, dict(base.modules), base.id)
    assert found == layout
    done = import_lora_files(files, out, found, rows_per_shard=3)
    data = LoraDataset(out)
    assert [r.subject for r in data.records] == [
        "b-diffusers",
        "c-narrow",
        "d-wide",
        "deeper/a-kohya",
    ]
    assert data.records[0].reference_sha256 == ("ab",) and len(data.shards) == 2
    for i, expected in ((0, made[2]), (1, made[1]), (3, made[2]), (2, made[4].resize(2))):
        for mine, theirs in zip(
            data.get_weights(i).get_delta_weights(), expected.get_delta_weights(), strict=True
        ):
            assert torch.allclose(mine, theirs, atol=1e-5)
    assert len(done.warnings) == 1 and "d-wide: rank 4 cut to 2" in done.warnings[0]
    assert [line.split(":")[1].strip() for line in done.errors] == ["e-conv", "f-other", "g-broken"]
    assert "'someone/else'" in done.errors[1]
    with pytest.raises(InvalidArgumentError, match="holds LoRAs already"):
        import_lora_files(files, out, found)
    with pytest.raises(InvalidArgumentError, match="no LoRA file"):
        import_lora_files(out / "nothing", tmp_path / "new", found)
