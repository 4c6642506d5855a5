"""What a step of pair training computes, and arguments that it refuses."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.weights import LoraWeights
from hyperlora.training.auxiliary_losses import AttributeLoss
from hyperlora.training.batches import PairBatch
from hyperlora.training.modules import pair_hypernetwork
from hyperlora.training.modules.edit_targets import EditTarget
from hyperlora.training.modules.pair_hypernetwork import (
    PairHypernetworkTraining,
    load_vocabulary,
)
from tests.conftest import Bundle
from tests.tiny_pipelines import get_tiny_pipeline
from tests.training.config_rules import TINY_VIT
from tests.training.module_checks import (
    configure_optimizer,
    list_parameter_ids,
    list_rates,
    record_validation,
)


def test_pair_hypernetwork_training_refuses_a_broken_vocabulary(
    bundle: Bundle, tmp_path: Path
) -> None:
    options = {
        "base": str(bundle.edit_base),
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


def test_vocabulary_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(VOCABULARY))
    options = {"width": 16, "instruction_head": {"depth": 1, "vocabulary": str(path)}}
    expected = {"width": 16, "instruction_head": {"depth": 1, "vocabulary": VOCABULARY}}
    assert load_vocabulary(options) == expected
    assert load_vocabulary(expected) is expected
    assert options["instruction_head"] == {"depth": 1, "vocabulary": str(path)}, "not changed"


def test_pair_hypernetwork_training_refuses_to_have_no_loss(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="there is no loss to train on"):
        PairHypernetworkTraining(
            base="", encoder="", output_dir=str(tmp_path), use_denoising_loss=False
        )


@dataclass
class LossCall:
    """One denoising loss of a step: the LoRAs, latents and images, prompts and the value."""

    weights: LoraWeights
    inputs: Tensor
    targets: Tensor
    images: Tensor | None
    prompts: list[str]
    value: float


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[LossCall]:
    recorded: list[LossCall] = []
    compute = PairHypernetworkTraining._compute_denoising_loss

    def record(module: Any, weights: LoraWeights, target: Any, prompts: list[str]) -> Tensor:
        loss = compute(module, weights, target, prompts)
        inputs = (target.input_latents, target.target_latents, target.input_images)
        recorded.append(LossCall(weights, *inputs, prompts, float(loss)))
        return loss

    monkeypatch.setattr(PairHypernetworkTraining, "_compute_denoising_loss", record)
    return recorded


def make_pair_module(bundle: Bundle, **options: Any) -> PairHypernetworkTraining:
    """A module whose LoRAs are not 0, the same for all options."""
    torch.manual_seed(3)
    network = {"width": 16, "depth": 1, "num_heads": 2, **options.pop("network", {})}
    module = PairHypernetworkTraining(
        base=str(bundle.edit_base),
        encoder="vit_tiny_patch16_224",
        output_dir="unused",
        preset="attention",
        network=network,
        encoder_options={"image_size": 16, "options": TINY_VIT},
        **{"delta_l2_weight": 0.0, "swap_prob": 0.0, **options},
    )
    torch.manual_seed(3)  # a classifier drew numbers, too
    for parameter in module.model.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def run_pair_step(bundle: Bundle, batch: PairBatch, **options: Any) -> float:
    """The loss of a step of ``make_pair_module``, with the same random numbers."""
    module = make_pair_module(bundle, **options)
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
    bundle: Bundle, batch: PairBatch, calls: list[LossCall]
) -> None:
    loss = run_pair_step(bundle, batch, reverse_weight=0.5)
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
    assert run_pair_step(bundle, batch, reverse_weight=0.0) == pytest.approx(calls[0].value)
    assert len(calls) == 1


@ignore_missing_trainer
def test_random_exchange_swaps_examples_and_targets(
    bundle: Bundle, batch: PairBatch, calls: list[LossCall]
) -> None:
    for swap_prob in (0.0, 1.0):
        run_pair_step(bundle, batch, swap_prob=swap_prob, reverse_weight=0.0)
    swapped_batch = batch.__class__(
        batch.instructions, batch.pairs.flip(2), before=batch.after, after=batch.before
    )
    run_pair_step(bundle, swapped_batch, reverse_weight=0.0)
    kept, swapped, expected = calls
    assert torch.equal(swapped.inputs, kept.targets) and torch.equal(swapped.targets, kept.inputs)
    torch.testing.assert_close(swapped.weights.flatten(), expected.weights.flatten())
    assert not torch.allclose(swapped.weights.flatten(), kept.weights.flatten(), atol=1e-3)


@ignore_missing_trainer
def test_instructions_are_given_with_their_probability(
    bundle: Bundle, batch: PairBatch, calls: list[LossCall]
) -> None:
    for instruction_prob, swap_prob in ((1.0, 0.0), (0.0, 0.0), (1.0, 1.0)):
        run_pair_step(bundle, batch, instruction_prob=instruction_prob, swap_prob=swap_prob)
    given, _, none, _, exchanged, _ = [call.prompts for call in calls]
    assert given == batch.instructions
    assert none == exchanged == ["", "", ""], "an exchanged edit has another instruction"
    assert all(call.prompts == ["", "", ""] for call in calls[1::2])


@ignore_missing_trainer
def test_l2_and_shift_of_pairs_have_an_effect(
    bundle: Bundle, batch: PairBatch, calls: list[LossCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"reverse_weight": 0.0}
    plain, weighted = (
        run_pair_step(bundle, batch, delta_l2_weight=weight, **options) for weight in (0.0, 2.0)
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
    run_pair_step(bundle, batch, timestep_shift=3.0)
    assert shifts == [3.0, 3.0]


@ignore_missing_trainer
def test_changed_latents_weigh_more(
    bundle: Bundle, batch: PairBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 + w min(1, change / std of the target), in both directions of the edit."""
    weights = []
    compute = pair_hypernetwork.compute_denoising_loss
    monkeypatch.setattr(
        pair_hypernetwork,
        "compute_denoising_loss",
        lambda *args, **kwargs: weights.append(kwargs["weight"]) or compute(*args, **kwargs),
    )
    run_pair_step(bundle, batch, edit_region_weight=2.0)
    run_pair_step(bundle, batch)
    change = (batch.after - batch.before).abs().mean(1, keepdim=True)
    for weight, extra, target in zip(
        weights,
        (2.0, 2.0, 4.0, 4.0),
        (batch.after, batch.before, batch.after, batch.before),
        strict=True,
    ):
        expected = 1 + extra * (change / target.std()).clamp(max=1)
        torch.testing.assert_close(weight, expected)


@ignore_missing_trainer
def test_attributes_of_the_result_are_held_in_both_directions(
    bundle: Bundle, batch: PairBatch, calls: list[LossCall], tmp_path: Path
) -> None:
    torch.manual_seed(2)
    options = {"channels": 4, "base_channels": 8}
    classifier = AttributeClassifier("latents", 4, {"hat": ["a", "b", "c"]}, options=options)
    classifier.save_pretrained(tmp_path)
    before, after = torch.tensor([0, 1, 2]), torch.tensor([2, 2, 0])
    labeled = replace(batch, labels_before={"hat": before}, labels_after={"hat": after})
    seen: list[tuple[Tensor, Tensor | float | None]] = []
    make = AttributeLoss.make_aux_loss

    def record(loss: AttributeLoss, labels: Any, weight: Any = None) -> Any:
        seen.append((labels["hat"], weight))
        return make(loss, labels, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttributeLoss, "make_aux_loss", record)
        for swap_prob in (0.0, 1.0):
            run_pair_step(
                bundle,
                labeled,
                swap_prob=swap_prob,
                attribute_classifier=str(tmp_path),
                attribute_loss_weight=0.7,
            )
    assert [labels.tolist() for labels, _ in seen] == [
        after.tolist(),
        before.tolist(),
        before.tolist(),
        after.tolist(),
    ]
    assert [weight for _, weight in seen] == [1.0] * 4, "at every noise level"
    run_pair_step(bundle, batch)
    for labeled_call, plain in zip(calls[:2], calls[-2:], strict=True):
        assert labeled_call.value > plain.value + 0.05


VOCABULARY = {
    "categories": {"hat": ["add a hat", "no hat"], "mood": ["smile", "frown"]},
    "color_axes": {},
    "undo_template": "back to {}",
}
NETWORK: Mapping[str, Any] = {
    "fusion": "concat",
    "instruction_head": {
        "vocabulary": VOCABULARY,
        "num_text_tokens": 48,
        "cross_attention_dim": 16,
        "hidden_size": 12,
        "depth": 1,
    },
}
"""A network that predicts instructions, too."""


@ignore_missing_trainer
@pytest.mark.parametrize("has_undo", [True, False])
def test_instruction_loss_has_its_weight_and_knows_the_way_back(
    bundle: Bundle, calls: list[LossCall], has_undo: bool
) -> None:
    """A swapped pair shows the undo instruction; where it is not known, there is no loss."""
    torch.manual_seed(1)
    batch = PairBatch(
        instructions=["add a hat", "smile", ""],
        pairs=torch.rand(3, 1, 2, 3, 16, 16),
        before=torch.randn(3, 4, 4, 4),
        after=torch.randn(3, 4, 4, 4),
        undo_instructions=["no hat", "frown", ""] if has_undo else None,
    )
    head_options = NETWORK["instruction_head"] | {"num_patches": 4}
    network = {**NETWORK, "instruction_head": head_options}
    for swap_prob in (0.0, 1.0):
        options = {"network": network, "swap_prob": swap_prob, "reverse_weight": 0.0}
        module = make_pair_module(bundle, instruction_loss_weight=0.25, **options)
        instruction_head = module.model.network.instruction_head
        assert instruction_head is not None
        plain = make_pair_module(bundle, **options)
        calls.clear()
        losses = []
        for each in (module, plain):
            torch.manual_seed(4)
            with torch.no_grad():
                losses.append(float(each.training_step(batch, 0)))
        assert not instruction_head.input_norm.training, "the base runs: its batches are small"
        pairs = batch.pairs if swap_prob == 0 else batch.pairs.flip(2)
        before, after = (module.model.encoder(side) for side in pairs.unbind(2))
        fused = module.model.network.fuse_pair(before, after)
        swap_mask = torch.full((3,), bool(swap_prob))
        with torch.no_grad():
            _, is_correct = module._compute_instruction_loss(batch, swap_mask, before, after)
        if swap_prob and not has_undo:
            assert not is_correct.any(), "what is not known is not right"
        instructions = batch.undo_instructions if swap_prob else batch.instructions
        expected = 0.0
        if instructions is not None:
            vocabulary = instruction_head.vocabulary
            with torch.no_grad():
                logits = instruction_head.forward_logits(fused)
                loss = vocabulary.compute_loss(logits, vocabulary.encode(instructions))
            assert float(loss.min()) > 0.01
            expected = 0.25 * float(loss.mean())
        assert losses[0] - losses[1] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert losses[1] == pytest.approx(calls[-1].value)


@ignore_missing_trainer
def test_head_alone_learns_input_statistics_without_the_base(
    bundle: Bundle, calls: list[LossCall]
) -> None:
    torch.manual_seed(1)
    batch = PairBatch(instructions=["add a hat", "", "smile"], pairs=torch.rand(3, 1, 2, 3, 16, 16))
    options: dict[str, Any] = {"use_denoising_loss": False, "network": NETWORK}
    losses = []
    for weight in (1.0, 3.0):
        module = make_pair_module(bundle, instruction_loss_weight=weight, **options)
        torch.manual_seed(4)
        losses.append(float(module.training_step(batch, 0)))
        instruction_head = module.model.network.instruction_head
        assert instruction_head is not None and instruction_head.input_norm.training
        assert instruction_head.input_norm.running_mean.abs().max() > 0
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-5) and losses[0] > 0.1
    assert not calls


@ignore_missing_trainer
def test_validation_logs_each_control_with_the_same_noise(
    bundle: Bundle, batch: PairBatch, calls: list[LossCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_pair_module(bundle)
    logged: dict[str, float] = {}
    monkeypatch.setattr(
        module, "log", lambda name, value, **options: logged.update({name: float(value)})
    )
    state = torch.random.get_rng_state()
    with torch.no_grad():
        module.validation_step(batch, 6)
    assert torch.equal(torch.random.get_rng_state(), state), "training's own numbers go on"
    base, own, shuffled, reverse = calls
    names = ("base", "own", "shuffled", "reverse")
    assert logged == {
        f"val/loss_{name}": pytest.approx(call.value)
        for name, call in zip(names, calls, strict=True)
    }
    assert not any(delta.any() for delta in base.weights.get_delta_weights())
    expected = own.weights.flatten()
    assert torch.equal(shuffled.weights.flatten(), expected.roll(1, 0))
    for made, undone in zip(
        own.weights.get_delta_weights(), reverse.weights.get_delta_weights(), strict=True
    ):
        torch.testing.assert_close(undone, -made)
    assert torch.equal(reverse.inputs, batch.after) and torch.equal(reverse.targets, batch.before)
    assert torch.equal(own.inputs, batch.before) and own.prompts == ["", "", ""]
    torch.manual_seed(6)
    from hyperlora.training.modules.edit_targets import EditTarget

    with torch.no_grad():
        again = module._compute_denoising_loss(
            own.weights, EditTarget(batch.before, batch.after), ["", "", ""]
        )
    assert float(again) == pytest.approx(own.value)


@ignore_missing_trainer
def test_number_of_example_pairs_is_drawn_up_to_its_limit(
    bundle: Bundle, calls: list[LossCall]
) -> None:
    """LoRAs of one, two or three of four pairs differ, and no other occurs."""
    torch.manual_seed(1)
    before, after = torch.randn(2, 1, 4, 4, 4)
    batch = PairBatch([""], torch.rand(1, 4, 2, 3, 16, 16), before=before, after=after)
    module = make_pair_module(bundle, max_views=3, reverse_weight=0.0)
    with torch.no_grad():
        for seed in range(24):
            torch.manual_seed(seed)
            module.training_step(batch, 0)
        expected = [
            module.model.generate_from_features(*module._encode_pairs(batch, n)).flatten()
            for n in (1, 2, 3, 4)
        ]
    counts = [
        sum(torch.allclose(call.weights.flatten(), loras, atol=1e-6) for call in calls)
        for loras in expected
    ]
    assert sum(counts) == 24 and all(counts[:3]) and counts[3] == 0


@ignore_missing_trainer
def test_images_are_encoded_where_there_are_no_latents(
    bundle: Bundle, calls: list[LossCall]
) -> None:
    torch.manual_seed(1)
    images = torch.rand(2, 2, 3, 16, 16)
    batch = PairBatch(["", ""], torch.rand(2, 1, 2, 3, 16, 16), images=images)
    module = make_pair_module(bundle, reverse_weight=0.0)
    with torch.no_grad():
        module.training_step(batch, 0)
        torch.testing.assert_close(calls[0].inputs, module.base.encode_images(images[:, 0]).float())
        torch.testing.assert_close(
            calls[0].targets, module.base.encode_images(images[:, 1]).float()
        )


@ignore_missing_trainer
def test_tokens_of_a_cache_replace_the_encoder(
    bundle: Bundle, batch: PairBatch, calls: list[LossCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_pair_module(bundle, reverse_weight=0.0)
    assert batch.pairs is not None
    with torch.no_grad():
        sides = [module.model.encoder(side).tokens for side in batch.pairs.unbind(2)]
        tokens = torch.stack(sides, 2)  # [n, views, 2, tokens, width]
        module.training_step(batch, 0)
        monkeypatch.setattr(module.model, "encoder", None)
        cached = module._encode_pairs(replace(batch, pairs=None, tokens=tokens.half()), 1)
        own = module.model.generate_from_features(*cached)
    for features, expected in zip(cached, sides, strict=True):
        assert features.tokens.dtype == torch.float32
        torch.testing.assert_close(features.tokens, expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(own.flatten(), calls[0].weights.flatten(), atol=1e-2, rtol=1e-1)


def test_parts_are_frozen_and_optimized_as_asked(bundle: Bundle) -> None:
    for frozen in (True, False):
        module = make_pair_module(
            bundle, freeze_encoder=frozen, freeze_instruction_head=frozen, network=NETWORK
        )
        parts = (module.model.encoder, module.model.network.instruction_head)
        assert {p.requires_grad for part in parts for p in part.parameters()} == {not frozen}
        assert module.model.network.hypernetwork.code_proj.requires_grad
    names = {id(p): name for name, p in module.model.named_parameters()}
    for use_muon in (False, True):
        module.hparams["use_muon"] = use_muon
        optimizer = configure_optimizer(module)
        assert {names[i] for i in list_parameter_ids(optimizer)} == set(names.values())
        assert list_rates(optimizer) == {6e-4}
        by_muon = {
            names[id(p)]
            for group in optimizer.param_groups
            if group.get("use_muon")
            for p in group["params"]
        }
        head = module.model.network.instruction_head
        expected = head.list_hidden_matrices() if use_muon and head is not None else []
        assert by_muon == {names[id(p)] for p in expected}
        assert bool(by_muon) == use_muon
    plain = make_pair_module(bundle)
    plain.hparams["use_muon"] = True
    ids = {id(parameter) for parameter in plain.model.parameters()}
    assert list_parameter_ids(configure_optimizer(plain)) == ids, "no head, no hidden matrices"


@ignore_missing_trainer
@pytest.mark.parametrize("knows_instructions", [True, False])
def test_validation_compares_one_pair_with_its_controls(
    bundle: Bundle,
    batch: PairBatch,
    calls: list[LossCall],
    monkeypatch: pytest.MonkeyPatch,
    knows_instructions: bool,
) -> None:
    weight = 0.5 if knows_instructions else 0.0
    module = make_pair_module(
        bundle, network=NETWORK, instruction_loss_weight=weight, reverse_weight=0.5
    ).eval()
    logged: dict[str, Any] = {}

    def log_dict(values: dict[str, Any], prog_bar: bool, batch_size: int, sync_dist: bool) -> None:
        assert batch_size == 3 and sync_dist
        logged.update({name: float(value) for name, value in values.items()})

    monkeypatch.setattr(module, "log_dict", log_dict)
    two_pairs = replace(batch, pairs=torch.cat([batch.pairs, torch.rand_like(batch.pairs)], 1))
    with torch.no_grad():
        losses = record_validation(module, monkeypatch, two_pairs, [7])
        features = module._encode_pairs(two_pairs, 1)
        own = module.model.generate_from_features(*features)
    names = ["val/loss_base", "val/loss_own", "val/loss_shuffled", "val/loss_reverse"]
    assert losses == [
        (name, pytest.approx(call.value), 3) for name, call in zip(names, calls, strict=True)
    ]
    expected = [own * 0.0, own, own[[2, 0, 1]], -own]  # each edit with the LoRA before it
    for call, lora in zip(calls, expected, strict=True):
        torch.testing.assert_close(call.weights.flatten(), lora.flatten(), atol=1e-5, rtol=1e-4)
        assert call.prompts == [""] * 3
        before, after = (batch.before, batch.after)
        is_reverse = call is calls[3]
        assert torch.equal(call.inputs, after if is_reverse else before)
        assert torch.equal(call.targets, before if is_reverse else after)
    assert len({call.value for call in calls}) == 4
    with torch.no_grad():  # the noise is that of the number of the batch
        torch.manual_seed(7)
        again = module._compute_denoising_loss(
            own, EditTarget(batch.before, batch.after, input_images=batch.before), [""] * 3
        )
    assert float(again) == pytest.approx(calls[1].value)
    if knows_instructions:
        no_swap = torch.zeros(3, dtype=torch.bool)
        instruction_losses, is_correct = module._compute_instruction_loss(
            two_pairs, no_swap, *features
        )
        assert logged == {
            "val/instruction_loss": pytest.approx(float(instruction_losses.mean())),
            "val/instruction_acc": pytest.approx(float(is_correct.float().mean())),
        }
    else:
        assert not logged


@ignore_missing_trainer
@pytest.mark.parametrize("has_images", [True, False])
def test_text_encoder_sees_the_side_that_is_edited(
    bundle: Bundle,
    calls: list[LossCall],
    monkeypatch: pytest.MonkeyPatch,
    has_images: bool,
) -> None:
    """Qwen-Image-Edit reads the image with the instruction; from latents it is decoded."""
    base = DiffusionBase("tiny/qwen", get_tiny_pipeline("qwen_image_edit_plus").pipe)
    monkeypatch.setattr(pair_hypernetwork, "load_training_base", lambda *_, **__: base)
    torch.manual_seed(1)
    images = torch.rand(2, 2, 3, 32, 32)
    with torch.no_grad():
        before, after = (base.encode_images(side) for side in images.unbind(1))
        batch = PairBatch(
            ["a", "b"],
            torch.rand(2, 1, 2, 3, 16, 16),
            images=images if has_images else None,
            before=before,
            after=after,
        )
        decoded = [base.decode_latents(latents) for latents in (before, after)]
    image_before, image_after = images.unbind(1) if has_images else decoded

    module = make_pair_module(bundle)
    encoded: list[Tensor] = []
    encode_text = base.family.encode_text

    def record_images(prompts: list[str], images: Tensor) -> Any:
        encoded.append(images)
        return encode_text(prompts, images)

    monkeypatch.setattr(base.family, "encode_text", record_images)
    with torch.no_grad():
        for swap_prob in (0.0, 1.0):
            module.hparams["swap_prob"] = swap_prob
            module.training_step(batch, 0)
        record_validation(module, monkeypatch, batch, [0])
    expected = [image_before, image_after, image_after, image_before]
    expected += [image_before] * 3 + [image_after]
    assert len(calls) == len(encoded) == len(expected)
    for call, seen, image in zip(calls, encoded, expected, strict=True):
        assert call.images is not None
        torch.testing.assert_close(call.images, image)
        torch.testing.assert_close(seen, image)
