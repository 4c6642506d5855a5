"""What a step of InstructPix2Pix training computes, against diffusers' own schedule."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.training.batches import EditBatch
from hyperlora.training.modules.instruct_pix2pix import InstructPix2PixTraining, save_edit_pipeline
from tests.conftest import Bundle
from tests.training.module_checks import (
    configure_optimizer,
    list_parameter_ids,
    list_rates,
    record_validation,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # there is no trainer to log to


def make_module(bundle: Bundle, **options: Any) -> InstructPix2PixTraining:
    """The same weights for all options; a new UNet ignores the image before the edit."""
    torch.manual_seed(0)
    module = InstructPix2PixTraining(str(bundle.base), "unused", **options)
    torch.nn.init.normal_(module.unet.conv_in.weight, std=0.2)
    return module


def make_batch() -> EditBatch:
    torch.manual_seed(1)
    before, after = torch.randn(2, 3, 4, 8, 8)
    labels = {"hat": torch.tensor([0, 2, 1])}
    return EditBatch(before, after, ["add a hat", "make it blue", "smile"], labels)


class Reference:
    """The terms of the step after seed 11, from the UNet and the scheduler of diffusers.

    Attributes:
        drop_mask: Samples without conditions.
        squared_error: Of the prediction, [n, c, h, w].
        pred_x0: Predicted clean latents.
    """

    def __init__(
        self,
        module: InstructPix2PixTraining,
        batch: EditBatch,
        drop_prob: float = 0.0,
        shift: float = 1.0,
    ) -> None:
        torch.manual_seed(11)
        self.drop_mask = torch.rand(3) < drop_prob
        u, noise = torch.rand(3), torch.randn_like(batch.after)
        timesteps = (1000 * shift * u / (1 + (shift - 1) * u)).long()
        scheduler = module.noise_scheduler
        noisy_latents = scheduler.add_noise(batch.after, noise, timesteps)
        pairs = zip(batch.instructions, self.drop_mask.tolist(), strict=True)
        prompts = ["" if is_dropped else text for text, is_dropped in pairs]
        pipeline = module.base.pipeline
        prompt_embeds, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
        images = batch.before / pipeline.vae.config.scaling_factor
        images = images * (~self.drop_mask).float().view(3, 1, 1, 1)
        output = module.unet(torch.cat([noisy_latents, images], 1), timesteps, prompt_embeds).sample
        alpha = scheduler.alphas_cumprod[timesteps].sqrt().view(3, 1, 1, 1)
        sigma = (1 - alpha.square()).sqrt()
        if scheduler.config.prediction_type == "sample":
            target, self.pred_x0 = batch.after, output
        else:
            target = scheduler.get_velocity(batch.after, noise, timesteps)
            self.pred_x0 = alpha * noisy_latents - sigma * output
        self.squared_error = (output - target).square()


def compute_region_weights(batch: EditBatch, extra: float) -> Tensor:
    change = (batch.after - batch.before).abs().mean(1, keepdim=True) / batch.after.std()
    return 1 + extra * change.clamp(max=1)


def compute_step_loss(module: InstructPix2PixTraining, batch: EditBatch) -> Tensor:
    torch.manual_seed(11)
    return module.training_step(batch, 0)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize(
    ("shift", "extra", "drop_prob"), [(1.0, 0.0, 0.0), (3.0, 2.0, 0.6), (1.0, 4.0, 1.0)]
)
def test_step_is_the_weighted_error_of_the_edit(
    bundle: Bundle, prediction_type: str, shift: float, extra: float, drop_prob: float
) -> None:
    module = make_module(
        bundle,
        prediction_type=prediction_type,
        timestep_shift=shift,
        edit_region_weight=extra,
        cond_dropout_prob=drop_prob,
    )
    batch = make_batch()
    batch = replace(batch, after=torch.where(torch.rand(8, 8) < 0.5, batch.before, batch.after))
    reference = Reference(module, batch, drop_prob, shift)
    if drop_prob == 0.6:
        assert reference.drop_mask.any() and not reference.drop_mask.all()
    expected = (reference.squared_error * compute_region_weights(batch, extra)).mean()
    torch.testing.assert_close(compute_step_loss(module, batch), expected)


def test_defaults_drop_one_in_twenty_and_weight_the_edit_five_times(bundle: Bundle) -> None:
    module, batch = make_module(bundle), make_batch()
    assert module.noise_scheduler.config.prediction_type == "v_prediction"
    reference = Reference(module, batch, 0.05)
    expected = (reference.squared_error * compute_region_weights(batch, 4.0)).mean()
    torch.testing.assert_close(compute_step_loss(module, batch), expected)
    assert module.hparams["cond_dropout_prob"] == 0.05
    assert module.attribute_loss.classifier is None and module.preview_loss is None


def test_further_losses_have_their_weights_and_ignore_dropped_samples(
    bundle: Bundle, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    options = {"channels": 4, "base_channels": 8}
    classifier = AttributeClassifier("latents", 8, {"hat": ["a", "b", "c"]}, options=options)
    classifier.save_pretrained(tmp_path)
    batch = make_batch()
    further = {
        "attribute_classifier": str(tmp_path),
        "attribute_loss_weight": 0.7,
        "preview_loss_weight": 0.3,
    }
    for names in ([], list(further)[:2], list(further)[2:], list(further)):
        module = make_module(
            bundle, cond_dropout_prob=0.6, **{name: further[name] for name in names}
        )
        loss = compute_step_loss(module, batch)
        reference = Reference(module, batch, 0.6)
        weights = compute_region_weights(batch, 4.0)
        expected = (reference.squared_error * weights).mean((1, 2, 3))
        kept = (~reference.drop_mask).float()
        if "attribute_classifier" in names:
            logits = classifier.eval()(reference.pred_x0).logits["hat"]
            labels = batch.labels["hat"]  # type: ignore[index]
            expected = expected + 0.7 * kept * F.cross_entropy(logits, labels, reduction="none")
        if "preview_loss_weight" in names:
            assert module.preview_loss is not None and module.preview_loss.kernel.shape[0] == 12
            difference = F.conv2d(
                reference.pred_x0 - batch.after, module.preview_loss.kernel, padding=1
            )
            preview_error = (difference.square() * weights).mean((1, 2, 3))
            assert preview_error.min() > 1e-4
            expected = expected + 0.3 * kept * preview_error
        torch.testing.assert_close(loss, expected.mean(), rtol=1e-4, atol=1e-5)


def test_validation_drops_nothing_and_repeats_its_noise(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch = make_module(bundle, cond_dropout_prob=1.0), make_batch()
    logged = record_validation(module, monkeypatch, batch, (7, 7))
    monkeypatch.setattr(module.hparams, "cond_dropout_prob", 0.0, raising=False)
    torch.manual_seed(7)
    expected = module._compute_loss(batch, torch.zeros(3, dtype=torch.bool))
    assert logged == [("val/loss", pytest.approx(float(expected)), 3)] * 2


def test_predicting_the_sample_starts_at_the_negated_velocity(
    bundle: Bundle, tmp_path: Path
) -> None:
    """Where all is noise, v = -x_0."""
    unet = load_diffusion_base(bundle.edit_base).denoiser
    for kind in ("v_prediction", "sample"):
        scheduler = DDPMScheduler(prediction_type=kind)
        save_edit_pipeline(tmp_path / kind, bundle.base, copy.deepcopy(unet), scheduler)
    for start_kind, kind, sign in (
        ("v_prediction", "v_prediction", 1),
        ("v_prediction", "sample", -1),
        ("sample", "sample", 1),
    ):
        module = InstructPix2PixTraining(
            str(bundle.base), "unused", prediction_type=kind, start_from=str(tmp_path / start_kind)
        )
        assert module.noise_scheduler.config.prediction_type == kind
        for name, value in unet.state_dict().items():
            expected = value.half().float() * (sign if name.startswith("conv_out.") else 1)
            assert torch.equal(module.unet.state_dict()[name], expected)


def test_new_unet_is_the_base_without_the_input_image(bundle: Bundle) -> None:
    torch.manual_seed(0)
    module = InstructPix2PixTraining(str(bundle.base), "unused")
    latents, images = torch.randn(2, 3, 4, 8, 8)
    timesteps, prompt_embeds = torch.tensor([10, 400, 900]), torch.randn(3, 5, 16)
    expected = module.base.denoiser(latents, timesteps, prompt_embeds).sample
    actual = module.unet(torch.cat([latents, images], 1), timesteps, prompt_embeds).sample
    torch.testing.assert_close(actual, expected)


def test_hidden_matrices_are_optimized_by_muon_at_their_rate(bundle: Bundle) -> None:
    module = make_module(bundle, lr=0.02)
    optimizer = configure_optimizer(module)
    assert list_parameter_ids(optimizer) == {id(p) for p in module.unet.parameters()}
    assert list_rates(optimizer) == {0.02}
    by_muon = {
        id(p) for group in optimizer.param_groups if group["use_muon"] for p in group["params"]
    }
    names = {name for name, p in module.unet.named_parameters() if id(p) in by_muon}
    assert not any(name.startswith(("conv_in", "conv_out")) for name in names)
    assert any("to_q.weight" in name for name in names)
