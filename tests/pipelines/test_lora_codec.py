"""``LoraCodec``: the scale of its latents, also of LoRAs that hardly differ."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.normalization import LoraNormalizer
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.lora_pca import FactorwiseLoraPCA, LoraPCA
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


class Rows:
    """A dataset in memory, in batches of 4."""

    layout = LAYOUT

    def __init__(self, num_loras: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        scale = torch.linspace(0.5, 3, LAYOUT.numel)
        self.rows = torch.randn(num_loras, LAYOUT.numel, generator=generator) * scale + 1

    def iter_batches(self) -> Iterator[Tensor]:
        """Read the rows."""
        yield from self.rows.split(4)

    def fit_normalizer(self, canonical: bool = False) -> LoraNormalizer:
        """Fit as ``LoraDataset`` does."""
        return LoraNormalizer.fit(LAYOUT, self.iter_batches(), canonical)


def test_latents_are_scaled_components_of_normalized_rows() -> None:
    dataset: Any = Rows(9)
    codec = LoraCodec.fit_pca(dataset, num_tokens=3, latent_width=2)
    assert codec.latent_shape == (3, 2) and codec.layout == LAYOUT
    rows = dataset.rows
    normalized = (rows - rows.mean(0)) / rows.std(0, correction=0)
    latents = normalized @ codec.autoencoder.components.T  # type: ignore[operator, union-attr]
    std = latents.std()
    torch.testing.assert_close(codec.latent_std, std)
    expected = (latents / std).view(9, 3, 2)
    torch.testing.assert_close(codec.encode_flat(rows), expected, atol=1e-5, rtol=1e-4)
    loras = LoraWeights.unflatten(LAYOUT, rows[:5])
    torch.testing.assert_close(codec.encode(loras), expected[:5], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("components_per_factor", [None, 12])
def test_decode_undoes_encode_with_all_components(components_per_factor: int | None) -> None:
    """9 LoRAs differ from their mean in 8 directions, as many as there are components."""
    dataset: Any = Rows(9)
    codec = LoraCodec.fit_pca(dataset, 2, 4, components_per_factor=components_per_factor)
    loras = LoraWeights.unflatten(LAYOUT, dataset.rows)
    decoded = codec.decode(codec.encode(loras))
    torch.testing.assert_close(decoded.flatten(), dataset.rows, atol=1e-4, rtol=1e-4)
    assert decoded.layout == LAYOUT
    # also one without a batch axis, and those of two batch axes
    latents = codec.encode(loras)
    torch.testing.assert_close(codec.encode(loras[2]), latents[2])
    torch.testing.assert_close(codec.decode(latents[2]).flatten(), decoded[2].flatten())
    rows = dataset.rows[:8].view(4, 2, -1)
    nested = codec.encode(LoraWeights.unflatten(LAYOUT, rows))
    torch.testing.assert_close(nested, latents[:8].view(4, 2, 2, 4))
    torch.testing.assert_close(codec.decode(nested).flatten(), rows, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("components_per_factor", [None, 3])
@pytest.mark.parametrize("canonical", [False, True])
def test_codec_rebuilds_from_its_config(
    canonical: bool, components_per_factor: int | None, tmp_path: Path
) -> None:
    dataset: Any = Rows(9)
    codec = LoraCodec.fit_pca(
        dataset, 2, 3, canonical=canonical, components_per_factor=components_per_factor
    )
    factorwise = {} if components_per_factor is None else {"components_per_factor": 3}
    config = codec.to_config()
    assert config == {
        "canonical": canonical,
        "kind": "factorwise_pca" if factorwise else "pca",
        "autoencoder": {"num_tokens": 2, "latent_width": 3} | factorwise,
    }
    rebuilt = LoraCodec.from_config(config, LAYOUT, tmp_path, None)
    assert isinstance(rebuilt.autoencoder, FactorwiseLoraPCA if factorwise else LoraPCA)
    assert rebuilt.to_config() == config and rebuilt.latent_std == 1
    rebuilt.load_state_dict(codec.state_dict())
    torch.testing.assert_close(rebuilt.encode_flat(dataset.rows), codec.encode_flat(dataset.rows))
    torch.testing.assert_close(codec.normalizer.mean, dataset.fit_normalizer(canonical).mean)


def test_codec_fits_no_canonical_form_by_default() -> None:
    dataset: Any = Rows(9)
    assert not LoraCodec.fit_pca(dataset, 2, 3).normalizer.canonical


def make_codec() -> LoraCodec:
    """Make a codec whose latents are the first 6 numbers of a LoRA."""
    codec = LoraCodec(LoraNormalizer(LAYOUT), LoraPCA(LAYOUT, 3, 2))
    codec.autoencoder.components.copy_(torch.eye(6, LAYOUT.numel))  # type: ignore[operator, union-attr]
    return codec


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_calibrate_measures_the_latents_of_all_rows(scale: float) -> None:
    """Of more rows than a batch has, and again with the same result."""
    codec, rows = make_codec(), Rows(300).rows * scale
    for _ in range(2):
        codec.calibrate(rows)
        torch.testing.assert_close(codec.latent_std, rows[:, :6].std())
    assert not codec.latent_std.requires_grad


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_calibrate_refuses_what_float16_cannot_hold(scale: float) -> None:
    with pytest.raises(InvalidArgumentError, match="a positive number was expected"):
        make_codec().calibrate(Rows(9).rows * scale)
