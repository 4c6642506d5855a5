"""``hyperlora generate --model`` with i2L v1, at tiny size."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hyperlora.compute import ComputeConfig
from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines.released.registry import open_released_model
from hyperlora.pipelines.released.released_model import ReleasedOptions
from tests.pipelines.released.tiny_i2l import save_i2l_world


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return save_i2l_world(tmp_path, monkeypatch)


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
