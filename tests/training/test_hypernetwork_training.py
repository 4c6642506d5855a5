"""What a step of hypernetwork training passes to the denoising loss."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.features import ImageFeatures
from hyperlora.training.batches import SubjectBatch
from hyperlora.training.modules import hypernetwork
from hyperlora.training.modules.hypernetwork import HypernetworkTraining
from tests.tiny_pipelines import get_tiny_pipeline
from tests.training.config_rules import TINY_VIT
from tests.training.module_checks import (
    configure_optimizer,
    list_parameter_ids,
    list_rates,
    record_validation,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # there is no trainer to log to


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("z_image")
    get_tiny_pipeline("z_image").pipe.save_pretrained(folder)
    return folder


def make_module(base_dir: Path, **options: Any) -> HypernetworkTraining:
    return HypernetworkTraining(
        str(base_dir),
        "vit_tiny_patch16_224",
        "unused",
        encoder_options={"image_size": 16, "options": TINY_VIT},
        hypernetwork={"width": 16, "depth": 1, "num_heads": 2},
        **options,
    )


def make_batch(**fields: Any) -> SubjectBatch:
    return SubjectBatch(
        captions=["a cat", "a dog"],
        subject_ids=torch.arange(2),
        photos=torch.rand(2, 1, 3, 16, 16),
        latents=torch.randn(2, 4, 8, 8),
        **fields,
    )


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of each call of the denoising loss."""
    calls: list[dict[str, Any]] = []
    compute = hypernetwork.compute_denoising_loss

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append({"latents": args[2], "conditions": args[3], **kwargs})
        return compute(*args, **kwargs)

    monkeypatch.setattr(hypernetwork, "compute_denoising_loss", record)
    return calls


def test_timestep_shift_reaches_the_loss(base_dir: Path, losses: list[dict[str, Any]]) -> None:
    make_module(base_dir, timestep_shift=3.0).training_step(make_batch(), 0)
    make_module(base_dir).training_step(make_batch(), 0)
    assert [call["shift"] for call in losses] == [3.0, 1.0]


def test_cached_conditions_are_not_encoded_again(
    base_dir: Path, losses: list[dict[str, Any]]
) -> None:
    module = make_module(base_dir)
    conditions = module.base.encode_prompts(["a cat", "a dog"])
    batch = make_batch(conditions=conditions)
    module.base.pipeline.text_encoder = None  # as in a training with a cache
    loss = module.training_step(batch, 0)
    assert losses[0]["conditions"] is conditions
    loss.backward()
    assert module.model.hypernetwork.code_proj.grad.abs().max() > 0


def make_predicting_module(base_dir: Path, **options: Any) -> HypernetworkTraining:
    """A module whose codes are not 0, the same for all options."""
    torch.manual_seed(3)
    module = make_module(base_dir, **options)
    torch.nn.init.normal_(module.model.hypernetwork.code_proj, std=0.3)
    return module


def compute_step_loss(module: HypernetworkTraining, batch: SubjectBatch) -> float:
    torch.manual_seed(4)
    return float(module.training_step(batch, 0))


def test_l2_of_delta_weights_has_its_weight(base_dir: Path) -> None:
    batch = make_batch()
    plain, weighted = (
        make_predicting_module(base_dir, delta_l2_weight=weight) for weight in (0.0, 3.0)
    )
    with torch.no_grad():
        weights = plain.model.forward(batch.photos)
        expected = 3.0 * float(weights.compute_mean_squared_norm())
        added = compute_step_loss(weighted, batch) - compute_step_loss(plain, batch)
    assert expected > 1e-4 and added == pytest.approx(expected, rel=1e-2)


def test_regression_to_fitted_codes_has_its_weight(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per subject, over those that have a target: here the first of two."""
    batch = make_batch()
    plain = make_predicting_module(base_dir)
    with torch.no_grad():
        features = plain.model.encode_photos(batch.photos).image
        codes = plain.model.hypernetwork.predict_codes(features)
    targets = torch.randn_like(codes[:1])
    save_file({"codes": targets}, tmp_path / "codes.safetensors")
    weighted = make_predicting_module(
        base_dir, code_targets=str(tmp_path / "codes.safetensors"), code_loss_weight=0.5
    )
    expected = 0.5 * float((codes[0] - targets[0]).square().sum()) / 2
    logged: dict[str, float] = {}
    monkeypatch.setattr(
        weighted, "log", lambda name, value, **_: logged.update({name: float(value)})
    )
    with torch.no_grad():
        added = compute_step_loss(weighted, batch) - compute_step_loss(plain, batch)
    assert added == pytest.approx(expected, rel=1e-3)
    assert logged["train/code_loss"] == pytest.approx(expected / 0.5, rel=1e-3)


def test_subjects_without_target_have_no_code_loss(base_dir: Path, tmp_path: Path) -> None:
    """Subjects beyond the table have no target; a weight of 0 reads no table."""
    batch = replace(make_batch(), subject_ids=torch.tensor([3, 0]))
    plain = make_predicting_module(base_dir)
    with torch.no_grad():
        features = plain.model.encode_photos(batch.photos).image
        codes = plain.model.hypernetwork.predict_codes(features)
    targets = torch.randn(3, *codes.shape[1:])
    save_file({"codes": targets}, tmp_path / "codes.safetensors")
    options = {"code_targets": str(tmp_path / "codes.safetensors")}
    with torch.no_grad():
        base_loss = compute_step_loss(plain, batch)
        ignored = compute_step_loss(make_predicting_module(base_dir, **options), batch)
        weighted = compute_step_loss(
            make_predicting_module(base_dir, code_loss_weight=2.0, **options), batch
        )
        without_table = compute_step_loss(
            make_predicting_module(base_dir, code_loss_weight=2.0), batch
        )
        save_file({"codes": torch.zeros(3, 1, 5)}, tmp_path / "other.safetensors")
        other = {"code_targets": str(tmp_path / "other.safetensors")}
        not_read = compute_step_loss(make_predicting_module(base_dir, **other), batch)
    assert ignored == without_table == not_read == base_loss
    expected = 2.0 * float((codes[1] - targets[0]).square().sum()) / 2
    assert weighted - base_loss == pytest.approx(expected, rel=1e-3)


def test_number_of_photos_is_drawn_up_to_its_limit(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_predicting_module(base_dir, max_views=3)
    batch = replace(make_batch(), photos=torch.rand(2, 4, 3, 16, 16))
    counts: dict[int, int] = {}
    predict = module.model.hypernetwork.predict_codes

    def record(features: ImageFeatures) -> torch.Tensor:
        num_views = features.tokens.shape[1]
        counts[num_views] = counts.get(num_views, 0) + 1
        assert torch.equal(features.tokens, all_features.tokens[:, :num_views])
        return predict(features)

    all_features = module.model.encode_photos(batch.photos).image
    monkeypatch.setattr(module.model.hypernetwork, "predict_codes", record)
    with torch.no_grad():
        for seed in range(20):
            torch.manual_seed(seed)
            module.training_step(batch, 0)
    assert set(counts) == {1, 2, 3}

    module.hparams["max_views"] = 8  # more than there are photos, and so are the tokens of each
    counts.clear()
    with torch.no_grad():
        for seed in range(12):
            torch.manual_seed(seed)
            expected = int(torch.randint(1, 5, ()))
            torch.manual_seed(seed)
            module.training_step(batch, 0)
            assert counts.pop(expected) == 1 and not counts


def test_features_and_images_stand_for_photos_and_latents(
    base_dir: Path, losses: list[dict[str, Any]]
) -> None:
    module, batch = make_predicting_module(base_dir), make_batch()
    with torch.no_grad():
        expected = compute_step_loss(module, batch)
        tokens = module.model.encode_photos(batch.photos).image.tokens
        cached = replace(batch, photos=None, tokens=tokens)
        assert compute_step_loss(module, cached) == pytest.approx(expected)
        images = torch.rand(2, 3, 64, 64)
        compute_step_loss(module, replace(batch, latents=None, images=images))
    latents = losses[-1]["latents"]
    torch.testing.assert_close(latents, module.base.encode_images(images).float())
    assert losses[0]["latents"].dtype == torch.float32


def test_validation_logs_each_control_with_the_same_noise(
    base_dir: Path, losses: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_predicting_module(base_dir)
    batch = replace(make_batch(), photos=torch.rand(2, 3, 3, 16, 16))
    with torch.no_grad():
        logged = record_validation(module, monkeypatch, batch, [6])
        loras = module.model.forward(batch.photos[:, :1])
        cases = {"base": loras * 0.0, "own": loras, "shuffled": loras[[1, 0]]}
        for entry, (name, lora) in zip(logged, cases.items(), strict=True):
            torch.manual_seed(6)
            with module.base.inject_lora(lora):
                expected = float(module._compute_denoising_loss(batch))
            assert entry == (f"val/loss_{name}", pytest.approx(expected, rel=1e-5), 2)
    assert [call["aux_loss"] for call in losses] == [None] * 6


def test_attributes_of_the_target_are_held(
    base_dir: Path, tmp_path: Path, losses: list[dict[str, Any]]
) -> None:
    torch.manual_seed(2)
    options = {"channels": 4, "base_channels": 8}
    classifier = AttributeClassifier("latents", 8, {"hat": ["a", "b", "c"]}, options=options)
    classifier.save_pretrained(tmp_path)
    labels = {"hat": torch.tensor([0, 2])}
    module = make_module(base_dir, attribute_classifier=str(tmp_path), attribute_loss_weight=0.5)
    module.training_step(make_batch(labels=labels), 0)
    aux_loss, latents = losses[0]["aux_loss"], torch.randn(2, 4, 8, 8)
    cross_entropy = torch.nn.functional.cross_entropy(
        AttributeClassifier.from_pretrained(tmp_path)(latents).logits["hat"],
        labels["hat"],
        reduction="none",
    )
    torch.testing.assert_close(aux_loss.fn(latents), 0.5 * cross_entropy)
    assert aux_loss.weight is None


def test_default_options(base_dir: Path) -> None:
    hparams = make_module(base_dir).hparams
    assert hparams["delta_l2_weight"] == 1e-3 and hparams["timestep_shift"] == 1.0
    assert hparams["code_loss_weight"] == hparams["attribute_loss_weight"] == 0.0
    assert hparams["max_views"] == 8 and hparams["lr"] == 3e-4


def test_hypernetwork_alone_is_optimized_at_its_rate(base_dir: Path) -> None:
    module = make_module(base_dir, lr=0.02)
    optimizer = configure_optimizer(module)
    network = module.model.hypernetwork
    assert list_parameter_ids(optimizer) == {id(p) for p in network.parameters()}
    assert list_rates(optimizer) == {0.02}
