"""``hyperlora generate --model`` with i2L v1, at tiny size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperlora.compute import ComputeConfig
from hyperlora.lora.io.load import load_lora
from hyperlora.models.i2l import compute_shape_digest, make_z_image_config
from hyperlora.pipelines.released import i2l, recognize
from hyperlora.pipelines.released.registry import open_released_model
from hyperlora.pipelines.released.released_model import ReleasedOptions
from tests.pipelines.released.tiny_networks import (
    DINOV3_CONFIG,
    EMBEDDING_DIM,
    SIGLIP_CONFIG,
    make_photo,
    save_encoders,
    save_i2l,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The network and its encoders; tiny sizes count as the released ones."""
    config = replace(make_z_image_config(16, 32, 2, 1, 3), embedding_dim=EMBEDDING_DIM)
    save_i2l(config, tmp_path / "network" / "model.safetensors")
    save_encoders(tmp_path / "encoders")
    digest = compute_shape_digest(config.tensor_shapes)[:8]
    monkeypatch.setitem(recognize.I2L_DIGESTS, digest, "z-image")
    monkeypatch.setattr(i2l, "make_siglip2_config", lambda: SIGLIP_CONFIG)
    monkeypatch.setattr(i2l, "make_dinov3_config", lambda: DINOV3_CONFIG)
    for i in range(2):
        make_photo(i, 300, 260).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("num_photos", [1, 2])
def test_generate_writes_the_lora_of_a_style(run: Any, folder: Path, num_photos: int) -> None:
    photos = [folder / f"{i}.png" for i in range(num_photos)]
    output = folder / "style.safetensors"
    result = run(
        "generate",
        *photos,
        *("--model", folder / "network", "--encoder", folder / "encoders"),
        *("--dtype", "float32", "-o", output),
    )
    assert result.code == 0, result
    model = open_released_model(
        str(folder / "network"),
        ReleasedOptions(encoder=str(folder / "encoders")),
        ComputeConfig(device="cpu", dtype="float32"),
    )
    expected = model(photos).weights
    assert expected.layout.rank == 4 * num_photos
    lora_file = load_lora(output, expected.layout)
    torch.testing.assert_close(
        lora_file.weights.flatten(), expected.flatten(), rtol=1e-5, atol=1e-5
    )
    assert "DINOv3 License" in result.err
    assert len(lora_file.metadata.reference_sha256) == num_photos
