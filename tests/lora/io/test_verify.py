"""Files are read back in memory before anything is written."""

from pathlib import Path

import pytest
import torch

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io import verify
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora, serialize_lora
from hyperlora.lora.io.verify import verify_file
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights

PATHS = ("down_blocks.0.attentions.0.proj_in", "mid_block.resnets.0.conv1")


def make_lora(paths: tuple[str, ...] = PATHS, seed: int = 1, rank: int = 3) -> LoraWeights:
    layout = LoraLayout(tuple(TargetModule(f"unet.{path}", 6, 5) for path in paths), rank, "a/b")
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights.unflatten(layout, torch.randn(layout.numel, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_verify_file_accepts_what_serialize_lora_makes(format: str, dtype: torch.dtype) -> None:
    lora = make_lora()
    verify_file(serialize_lora(lora, format=format, dtype=dtype), lora, dtype)


def test_verify_file_refuses_other_numbers_targets_and_bytes() -> None:
    lora = make_lora()
    data = serialize_lora(lora)
    for wrong_data, sentence in (
        (serialize_lora(make_lora(seed=2)), "relative error"),
        (serialize_lora(lora * 1.001), "relative error"),
        (serialize_lora(make_lora(PATHS[:1])), "could not be read back"),
        (data[:-8], "could not be read back"),
        (b"", "could not be read back"),
    ):
        with pytest.raises(InvalidArgumentError, match=sentence) as error:
            verify_file(wrong_data, lora, torch.float32)
        assert "\n" not in str(error.value)


def test_save_lora_leaves_nothing_where_the_file_could_not_be_read(tmp_path: Path) -> None:
    long_name = make_lora((".".join(["mid_block"] * 40),))  # no reader takes such a key
    path = tmp_path / "folder" / "x.safetensors"
    with pytest.raises(InvalidArgumentError, match="could not be read back"):
        save_lora(long_name, path, format="diffusers")
    assert not path.parent.exists()
    path.parent.mkdir()
    path.write_bytes(b"before")
    with pytest.raises(InvalidArgumentError, match="could not be read back"):
        save_lora(long_name, path, format="diffusers")
    assert [file.read_bytes() for file in path.parent.iterdir()] == [b"before"]


def test_files_of_one_structure_are_read_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_verified_structures", set())
    read: list[LoraWeights] = []
    monkeypatch.setattr(verify, "verify_file", lambda data, lora, dtype: read.append(lora))
    lora, other = make_lora(), make_lora(seed=2)
    for again in (lora, other):
        serialize_lora(again)
    assert len(read) == 1
    for different in (
        lambda: serialize_lora(lora, format="diffusers"),
        lambda: serialize_lora(lora, dtype=torch.float16),
        lambda: serialize_lora(make_lora(rank=2)),
        lambda: serialize_lora(make_lora(PATHS[:1])),
        lambda: serialize_lora(lora, metadata=LoraMetadata(trigger_phrase="sks")),
        lambda: serialize_lora(lora, metadata=LoraMetadata(title="x" * 70_000)),
        lambda: serialize_lora(lora, metadata=LoraMetadata(title="x" * 70_000)),
    ):
        count = len(read)
        different()
        assert len(read) == count + 1
    monkeypatch.setattr(verify, "_MAX_STRUCTURES", 3)
    for rank in range(1, 6):
        serialize_lora(make_lora(rank=rank, paths=PATHS[1:]))
    assert len(verify._verified_structures) <= 3


def test_refused_files_are_read_back_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_verified_structures", set())
    long_name = make_lora((".".join(["mid_block"] * 40),))
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match="could not be read back"):
            serialize_lora(long_name, format="diffusers")
