"""What a step of hypernetwork training passes to the denoising loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hyperlora.training.batches import SubjectBatch
from hyperlora.training.modules import hypernetwork
from hyperlora.training.modules.hypernetwork import HypernetworkTraining
from tests.training.config_rules import TINY_VIT

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # there is no trainer to log to


def make_module(workspace: Path, **options: Any) -> HypernetworkTraining:
    return HypernetworkTraining(
        str(workspace / "tiny/z_image"),
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
        calls.append({"conditions": args[3], **kwargs})
        return compute(*args, **kwargs)

    monkeypatch.setattr(hypernetwork, "compute_denoising_loss", record)
    return calls


def test_timestep_shift_reaches_the_loss(workspace: Path, losses: list[dict[str, Any]]) -> None:
    make_module(workspace, timestep_shift=3.0).training_step(make_batch(), 0)
    make_module(workspace).training_step(make_batch(), 0)
    assert [call["shift"] for call in losses] == [3.0, 1.0]


def test_cached_conditions_are_not_encoded_again(
    workspace: Path, losses: list[dict[str, Any]]
) -> None:
    module = make_module(workspace)
    conditions = module.base.encode_prompts(["a cat", "a dog"])
    batch = make_batch(conditions=conditions)
    module.base.pipeline.text_encoder = None  # as in a training with a cache
    loss = module.training_step(batch, 0)
    assert losses[0]["conditions"] is conditions
    loss.backward()
    assert module.model.hypernetwork.code_proj.grad.abs().max() > 0


def make_predicting_module(workspace: Path, **options: Any) -> HypernetworkTraining:
    """A module whose codes are not 0, the same for all options."""
    torch.manual_seed(3)
    module = make_module(workspace, **options)
    torch.nn.init.normal_(module.model.hypernetwork.code_proj, std=0.3)
    return module


def compute_step_loss(module: HypernetworkTraining, batch: SubjectBatch) -> float:
    torch.manual_seed(4)
    return float(module.training_step(batch, 0))


def test_l2_of_delta_weights_has_its_weight(workspace: Path) -> None:
    batch = make_batch()
    plain, weighted = (
        make_predicting_module(workspace, delta_l2_weight=weight) for weight in (0.0, 3.0)
    )
    with torch.no_grad():
        weights = plain.model.forward(batch.photos)
        expected = 3.0 * float(weights.compute_mean_squared_norm())
        added = compute_step_loss(weighted, batch) - compute_step_loss(plain, batch)
    assert expected > 1e-4 and added == pytest.approx(expected, rel=1e-2)


def test_regression_to_fitted_codes_has_its_weight(workspace: Path, tmp_path: Path) -> None:
    """Per subject, over those that have a target: here the first of two."""
    batch = make_batch()
    plain = make_predicting_module(workspace)
    with torch.no_grad():
        features = plain.model.encode_photos(batch.photos).image
        codes = plain.model.hypernetwork.predict_codes(features)
    targets = torch.randn_like(codes[:1])
    save_file({"codes": targets}, tmp_path / "codes.safetensors")
    weighted = make_predicting_module(
        workspace, code_targets=str(tmp_path / "codes.safetensors"), code_loss_weight=0.5
    )
    expected = 0.5 * float((codes[0] - targets[0]).square().sum()) / 2
    with torch.no_grad():
        added = compute_step_loss(weighted, batch) - compute_step_loss(plain, batch)
    assert added == pytest.approx(expected, rel=1e-3)
