"""What a step of pair training computes, and arguments that it refuses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.weights import LoraWeights
from hyperlora.training.batches import PairBatch
from hyperlora.training.modules import pair_hypernetwork
from hyperlora.training.modules.pair_hypernetwork import PairHypernetworkTraining
from tests.training.config_rules import TINY_VIT


def test_pair_hypernetwork_training_refuses_a_broken_vocabulary(
    workspace: Path, tmp_path: Path
) -> None:
    options = {
        "base": str(workspace / "tiny/instruct_pix2pix"),
        "encoder": "resnet10t",
        "output_dir": str(tmp_path),
    }
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        head_options = {
            "num_text_tokens": 4,
            "cross_attention_dim": 8,
            "vocabulary": str(tmp_path / name),
        }
        with pytest.raises(
            InvalidArgumentError, match=rf"{name}' is no JSON file.*data_builder draw-pairs"
        ):
            PairHypernetworkTraining(**options, network={"instruction_head": head_options})


def test_pair_hypernetwork_training_refuses_to_have_no_loss(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="there is no loss to train on"):
        PairHypernetworkTraining(
            base="", encoder="", output_dir=str(tmp_path), use_denoising_loss=False
        )


@dataclass
class LossCall:
    """One denoising loss of a step: the LoRAs, input and target latents, prompts and the value."""

    weights: LoraWeights
    inputs: Tensor
    targets: Tensor
    prompts: list[str]
    value: float


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[LossCall]:
    recorded: list[LossCall] = []
    compute = PairHypernetworkTraining._compute_denoising_loss

    def record(module: Any, weights: LoraWeights, target: Any, prompts: list[str]) -> Tensor:
        loss = compute(module, weights, target, prompts)
        latents = (target.input_latents, target.target_latents)
        recorded.append(LossCall(weights, *latents, prompts, float(loss)))
        return loss

    monkeypatch.setattr(PairHypernetworkTraining, "_compute_denoising_loss", record)
    return recorded


def run_pair_step(workspace: Path, batch: PairBatch, **options: Any) -> float:
    """The loss of a step of a network whose LoRAs are not 0, the same for all options."""
    torch.manual_seed(3)
    module = PairHypernetworkTraining(
        base=str(workspace / "tiny/instruct_pix2pix"),
        encoder="vit_tiny_patch16_224",
        output_dir="unused",
        preset="attention",
        network={"width": 16, "depth": 1, "num_heads": 2},
        encoder_options={"image_size": 16, "options": TINY_VIT},
        **{"delta_l2_weight": 0.0, "swap_prob": 0.0, **options},
    )
    for parameter in module.model.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.manual_seed(4)
    with torch.no_grad():
        return float(module.training_step(batch, 0))


@pytest.fixture(scope="module")
def batch() -> PairBatch:
    torch.manual_seed(1)
    before, after = torch.randn(2, 3, 4, 4, 4)
    return PairBatch(
        instructions=["add a hat", "make it blue", "smile"],
        pairs=torch.rand(3, 1, 2, 3, 16, 16),
        before=before,
        after=after,
    )


ignore_missing_trainer = pytest.mark.filterwarnings("ignore::UserWarning")


@ignore_missing_trainer
def test_negated_lora_undoes_the_edit(
    workspace: Path, batch: PairBatch, calls: list[LossCall]
) -> None:
    loss = run_pair_step(workspace, batch, reverse_weight=0.5)
    forward, reverse = calls
    assert torch.equal(forward.inputs, batch.before) and torch.equal(forward.targets, batch.after)
    assert torch.equal(reverse.inputs, batch.after) and torch.equal(reverse.targets, batch.before)
    for made, undone in zip(
        forward.weights.get_delta_weights(), reverse.weights.get_delta_weights(), strict=True
    ):
        assert made.abs().max() > 1e-4
        torch.testing.assert_close(undone, -made)
    assert loss == pytest.approx(forward.value + 0.5 * reverse.value, rel=1e-5)

    calls.clear()
    assert run_pair_step(workspace, batch, reverse_weight=0.0) == pytest.approx(calls[0].value)
    assert len(calls) == 1


@ignore_missing_trainer
def test_random_exchange_swaps_examples_and_targets(
    workspace: Path, batch: PairBatch, calls: list[LossCall]
) -> None:
    for swap_prob in (0.0, 1.0):
        run_pair_step(workspace, batch, swap_prob=swap_prob, reverse_weight=0.0)
    swapped_batch = batch.__class__(
        batch.instructions, batch.pairs.flip(2), before=batch.after, after=batch.before
    )
    run_pair_step(workspace, swapped_batch, reverse_weight=0.0)
    kept, swapped, expected = calls
    assert torch.equal(swapped.inputs, kept.targets) and torch.equal(swapped.targets, kept.inputs)
    torch.testing.assert_close(swapped.weights.flatten(), expected.weights.flatten())
    assert not torch.allclose(swapped.weights.flatten(), kept.weights.flatten(), atol=1e-3)


@ignore_missing_trainer
def test_instructions_are_given_with_their_probability(
    workspace: Path, batch: PairBatch, calls: list[LossCall]
) -> None:
    for instruction_prob, swap_prob in ((1.0, 0.0), (0.0, 0.0), (1.0, 1.0)):
        run_pair_step(workspace, batch, instruction_prob=instruction_prob, swap_prob=swap_prob)
    given, _, none, _, exchanged, _ = [call.prompts for call in calls]
    assert given == batch.instructions
    assert none == exchanged == ["", "", ""], "an exchanged edit has another instruction"
    assert all(call.prompts == ["", "", ""] for call in calls[1::2])


@ignore_missing_trainer
def test_l2_and_shift_of_pairs_have_an_effect(
    workspace: Path, batch: PairBatch, calls: list[LossCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"reverse_weight": 0.0}
    plain, weighted = (
        run_pair_step(workspace, batch, delta_l2_weight=weight, **options) for weight in (0.0, 2.0)
    )
    expected = 2.0 * float(calls[0].weights.compute_mean_squared_norm())
    assert expected > 1e-4 and weighted - plain == pytest.approx(expected, rel=1e-2)
    shifts = []
    compute = pair_hypernetwork.compute_denoising_loss
    monkeypatch.setattr(
        pair_hypernetwork,
        "compute_denoising_loss",
        lambda *args, **kwargs: shifts.append(kwargs["shift"]) or compute(*args, **kwargs),
    )
    run_pair_step(workspace, batch, timestep_shift=3.0)
    assert shifts == [3.0, 3.0]
