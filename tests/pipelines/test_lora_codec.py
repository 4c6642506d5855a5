"""``LoraCodec``: the scale of its latents, also of LoRAs that hardly differ."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.normalization import LoraNormalizer
from hyperlora.models.lora_pca import LoraPCA
from hyperlora.pipelines.lora_codec import LoraCodec

LAYOUT = LoraLayout((TargetModule("unet.to_q", 6, 5),), rank=2, base="tiny")


def fit_codec(rows: Tensor) -> LoraCodec:
    normalizer = LoraNormalizer.fit(LAYOUT, [rows])
    autoencoder = LoraPCA(LAYOUT, 2, 2)
    autoencoder.fit(normalizer.normalize(rows))
    codec = LoraCodec(normalizer, autoencoder)
    codec.calibrate(rows)
    return codec


@pytest.mark.parametrize("num_loras", [1, 3, 300])
def test_calibrate_refuses_loras_that_are_all_equal(num_loras: int) -> None:
    """Divided by their standard deviation of 0, their latents would be NaN."""
    rows = torch.randn(LAYOUT.numel).expand(num_loras, -1)
    with pytest.raises(InvalidArgumentError, match=r"standard deviation of 0.*must differ"):
        fit_codec(rows)


def test_calibrate_refuses_loras_that_are_no_numbers() -> None:
    rows = torch.randn(4, LAYOUT.numel)
    codec = fit_codec(rows)
    rows[2, 3] = torch.nan
    with pytest.raises(InvalidArgumentError, match="deviation of nan"):
        codec.calibrate(rows)


@pytest.mark.parametrize("scale", [1.0, 1e-7, 2e-8, 1e-9])
def test_saved_codec_encodes_numbers_that_hardly_vary(scale: float, tmp_path: Path) -> None:
    """Files have float16, where a standard deviation below 3e-8 would be 0."""
    torch.manual_seed(0)
    rows = torch.randn(8, LAYOUT.numel)
    rows[:, :7] *= scale
    codec = fit_codec(rows)
    assert codec.encode_flat(rows).std() == pytest.approx(1)
    codec.save_pretrained(tmp_path)
    latents = LoraCodec.from_pretrained(tmp_path).encode_flat(rows)
    assert latents.isfinite().all()
    assert latents.std() == pytest.approx(1, abs=0.3)  # the mean, too, is rounded
