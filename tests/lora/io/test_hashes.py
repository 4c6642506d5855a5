"""Hashes in headers against kohya's and ModelSpec's own computation."""

import hashlib
import io
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from hyperlora.lora.io.hashes import HASH_KEYS
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights


def make_lora(width: int, rank: int = 4, seed: int = 0) -> LoraWeights:
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    targets = tuple(TargetModule(f"{name}.to_{part}", width, width) for part in "qkv")
    layout = LoraLayout(targets, rank, "org/base")
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights.unflatten(layout, torch.randn(layout.numel, generator=generator))


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def compute_kohya_hashes(path: Path, metadata: dict[str, str]) -> tuple[str, str]:
    """``precalculate_safetensors_hashes`` of sd-scripts, with safetensors' own writer."""
    kohya_metadata = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    file = io.BytesIO(safetensors.torch.save(safetensors.torch.load_file(path), kohya_metadata))
    file.seek(8 + int.from_bytes(file.read(8), "little"))
    model_hash = hashlib.sha256(file.read()).hexdigest()
    file.seek(0x100000)
    return model_hash, hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (24, torch.float32),
        (30_000, torch.float16),
        (12_500, torch.float32),
        (50_001, torch.float32),
    ],
)
def test_save_lora_writes_the_hashes_that_kohya_computes(
    tmp_path: Path, format: str, width: int, dtype: torch.dtype
) -> None:
    metadata = LoraMetadata(title="Zoë \x01\n'\"", trigger_phrase="sks ü", output_name="ignored")
    path = save_lora(
        make_lora(width),
        tmp_path / "zoë.safetensors",
        format=format,
        dtype=dtype,
        metadata=metadata,
    )
    header = read_metadata(path)
    model_hash, legacy_hash = compute_kohya_hashes(path, header)
    assert (header["sshs_model_hash"], header["sshs_legacy_hash"]) == (model_hash, legacy_hash)
    assert header["modelspec.hash_sha256"] == f"0x{model_hash}"
    assert header["ss_output_name"] == "zoë"
    # A1111's own hash is that of the file on disk
    data = path.read_bytes()
    tensors_begin = 8 + int.from_bytes(data[:8], "little")
    assert hashlib.sha256(data[tensors_begin:]).hexdigest() == model_hash


def test_load_lora_forgets_hashes_of_the_file(tmp_path: Path) -> None:
    path = save_lora(make_lora(8), tmp_path / "a.safetensors")
    tensors = safetensors.torch.load_file(path)
    stale = dict.fromkeys((*HASH_KEYS, "modelspec.hash_md5"), "stale")
    stale |= {"modelspec.implementation_version": "sd-scripts/1", "ss_steps": "9"}
    safetensors.torch.save_file(tensors, tmp_path / "b.safetensors", stale)
    lora = load_lora(tmp_path / "b.safetensors").lora
    assert dict(lora.metadata.extra) == {"ss_steps": "9"}
    header = read_metadata((2.0 * lora).save(tmp_path / "c.safetensors", format="kohya"))
    assert "stale" not in header.values()
    assert header["sshs_model_hash"] == compute_kohya_hashes(tmp_path / "c.safetensors", header)[0]
    assert header["ss_steps"] == "9"


def test_headers_have_trigger_words_where_lora_managers_look(tmp_path: Path) -> None:
    metadata = LoraMetadata(trigger_phrase="ohwx cat", reference_sha256=("a", "b", "c"))
    path = save_lora(make_lora(8), tmp_path / "a.safetensors", metadata=metadata)
    header = read_metadata(path)
    (words,) = json.loads(header["ss_tag_frequency"]).values()  # as ComfyUI-Lora-Manager reads
    assert words == {"ohwx cat": 3}
    (dataset,) = json.loads(header["ss_datasets"])
    assert dataset["subsets"][0]["class_tokens"] == "ohwx cat"
    assert dataset["tag_frequency"] == json.loads(header["ss_tag_frequency"])
    loaded = load_lora(path).metadata
    assert (loaded.trigger_phrase, dict(loaded.extra)) == ("ohwx cat", {})
    trained = LoraMetadata(trigger_phrase="x", extra={"ss_tag_frequency": '{"1_x": {"y": 2}}'})
    header = read_metadata(save_lora(make_lora(8), path, metadata=trained))
    assert header["ss_tag_frequency"] == '{"1_x": {"y": 2}}'
    assert "ss_datasets" not in header
