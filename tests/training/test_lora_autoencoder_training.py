"""What a step of the training of the LoRA autoencoder computes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.normalization import LoraNormalizer
from hyperlora.training.modules import lora_autoencoder
from hyperlora.training.modules.lora_autoencoder import LoraAutoencoderTraining
from tests.training.module_checks import configure_optimizer, list_parameter_ids, list_rates

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # there is no trainer to log to
LAYOUT = LoraLayout((TargetModule("unet.a", 6, 8), TargetModule("unet.b", 8, 4)), 2, "tiny")


class TinyDataset:
    """21 random LoRAs, whose numbers have different means and scales."""

    layout = LAYOUT

    def __init__(self, folder: str, split: str) -> None:
        assert (folder, split) == ("folder", "train")
        torch.manual_seed(0)
        scales = torch.logspace(-1, 1, LAYOUT.numel)
        self.rows = torch.randn(21, LAYOUT.numel) * scales + torch.randn(LAYOUT.numel)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice) -> Tensor:
        return self.rows[index]

    def fit_normalizer(self, canonical: bool, per_factor: bool) -> LoraNormalizer:
        return LoraNormalizer.fit(LAYOUT, [self.rows], canonical, per_factor)


@pytest.fixture
def make_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(lora_autoencoder, "LoraDataset", TinyDataset)

    def make(**options: Any) -> LoraAutoencoderTraining:
        torch.manual_seed(3)
        autoencoder = {"directions_per_factor": 4, "latent_width": 3, "width": 8, "depth": 1}
        return LoraAutoencoderTraining(
            "folder", "unused", autoencoder | options.pop("autoencoder", {}), **options
        )

    return make


@pytest.mark.parametrize("magnitude_weight", [0.0, 2.5])
@pytest.mark.parametrize("canonicalize", [False, True])
def test_loss_is_weighted_by_magnitude_and_in_units_of_the_variance(
    make_module: Any, magnitude_weight: float, canonicalize: bool
) -> None:
    module = make_module(magnitude_weight=magnitude_weight, canonicalize=canonicalize)
    rows = TinyDataset("folder", "train").rows[:5]
    normalizer = module.model.normalizer
    with torch.no_grad():
        normalized = normalizer.normalize(rows)
        target = normalizer.denormalize(normalized)
        assert torch.allclose(target, rows, atol=1e-4) is not canonicalize
        error = normalizer.denormalize(module.model.autoencoder(normalized)[0]) - target
        share = target.abs() / target.abs().amax(1, keepdim=True)
        expected = ((1 + magnitude_weight * share) * error.square()).mean()
        expected = expected / normalizer.std.square().mean()
        torch.testing.assert_close(module.training_step(rows, 0), expected)
    assert float(expected) > 1e-3


def test_kl_divergence_has_its_weight(make_module: Any) -> None:
    rows, losses = TinyDataset("folder", "train").rows[:5], {}
    for kl_weight in (0.0, 0.25):
        module = make_module(kl_weight=kl_weight, autoencoder={"variational": True})
        torch.manual_seed(5)
        losses[kl_weight] = module.training_step(rows, 0)
    torch.manual_seed(5)
    _, kl = module.model.autoencoder(module.model.normalizer.normalize(rows))
    assert float(kl.mean()) > 0.1
    torch.testing.assert_close(losses[0.25] - losses[0.0], 0.25 * kl.mean(), rtol=1e-3, atol=1e-4)


def test_training_starts_at_principal_components(make_module: Any) -> None:
    """With as many directions as a factor has numbers, nothing is lost."""
    lossless = {"directions_per_factor": 16, "latent_width": 32, "depth": 0}
    rows = TinyDataset("folder", "train").rows
    assert float(make_module(autoencoder=lossless).training_step(rows, 0)) < 1e-4
    assert float(make_module().training_step(rows, 0)) > 1e-2


def test_validation_compares_delta_weights_with_those_of_the_data(
    make_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperlora.lora.merge import compare_deltas
    from hyperlora.lora.weights import LoraWeights

    module, logged = make_module(), {}
    monkeypatch.setattr(
        module, "log_dict", lambda values, **options: logged.update(values, **options)
    )
    rows = TinyDataset("folder", "train").rows[:5]
    with torch.no_grad():
        module.validation_step(rows, 0)
        decoded = module.model.decode(module.model.encode_flat(rows))
    target = LoraWeights.unflatten(LAYOUT, rows)
    error, cosine = compare_deltas(target, decoded)
    assert logged["val/relative_error"] == pytest.approx(float(error.mean()))
    assert logged["val/cosine"] == pytest.approx(float(cosine.mean()))
    assert logged["sync_dist"] is True
    assert logged["batch_size"] == 5 and 0.01 < logged["val/relative_error"] < 1


def test_default_options(make_module: Any) -> None:
    hparams = make_module().hparams
    assert (hparams["magnitude_weight"], hparams["kl_weight"], hparams["lr"]) == (1.0, 0.0, 1e-3)


def test_calibrated_codec_is_written_at_the_end(
    make_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperlora.pipelines.lora_codec import LoraCodec

    for is_global_zero, folder in ((False, tmp_path / "other"), (True, tmp_path / "first")):
        module = make_module()
        module.hparams["output_dir"] = str(folder)
        module._trainer = SimpleNamespace(is_global_zero=is_global_zero)
        module.on_train_end()
        assert folder.exists() == is_global_zero
    rows = TinyDataset("folder", "train").rows
    latents = LoraCodec.from_pretrained(tmp_path / "first").encode_flat(rows)
    assert float(latents.std()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("num_rows", "expected"), [(20, 20), (300, 256)])
def test_latents_are_calibrated_on_a_part_of_the_training_loras(
    make_module: Any, monkeypatch: pytest.MonkeyPatch, num_rows: int, expected: int
) -> None:
    module = make_module()
    module._trainer = SimpleNamespace(is_global_zero=True)
    rows = torch.arange(float(num_rows))[:, None].expand(-1, 3)
    monkeypatch.setattr(lora_autoencoder, "LoraDataset", lambda folder, split: rows)
    calibrated: list[Tensor] = []
    monkeypatch.setattr(module.model, "calibrate", calibrated.append)
    monkeypatch.setattr(module.model, "save_pretrained", lambda folder: None)
    module.on_train_end()
    assert torch.equal(calibrated[0], rows[:expected])
    module.to("meta")
    module.on_train_end()
    assert calibrated[1].is_meta, "on the device of the training"


def test_whole_codec_is_optimized_at_its_rate(make_module: Any) -> None:
    module = make_module(lr=0.02)
    optimizer = configure_optimizer(module)
    assert list_parameter_ids(optimizer) == {id(p) for p in module.parameters()}
    assert list_rates(optimizer) == {0.02}
