"""What a step of text-to-image training computes, against diffusers' own schedule."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.training.batches import CaptionedLatentBatch
from hyperlora.training.modules.text_to_image import NOISE_SCHEDULE, TextToImageTraining
from tests.conftest import Bundle
from tests.training.module_checks import (
    configure_optimizer,
    list_parameter_ids,
    list_rates,
    record_validation,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # there is no trainer to log to
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
TEXT_ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def make_module(bundle: Bundle, **options: Any) -> TextToImageTraining:
    """The same weights for all options."""
    torch.manual_seed(0)
    return TextToImageTraining(
        str(bundle.base / "vae"),
        str(bundle.base / "tokenizer"),
        "unused",
        unet=UNET,
        text_encoder=TEXT_ENCODER,
        **options,
    )


def make_batch() -> CaptionedLatentBatch:
    torch.manual_seed(1)
    labels = {"hat": torch.tensor([0, 2, 1])}
    return CaptionedLatentBatch(torch.randn(3, 4, 6, 8), ["a hat", "", "a cap"], labels)


def compute_reference(
    module: TextToImageTraining, batch: CaptionedLatentBatch, shift: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared errors [n, c, h, w], predicted x_0 and noise level [n] of the step after seed 11."""
    torch.manual_seed(11)
    u, noise = torch.rand(3), torch.randn_like(batch.latents)
    timesteps = (1000 * shift * u / (1 + (shift - 1) * u)).long()
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    noisy_latents = scheduler.add_noise(batch.latents, noise, timesteps)
    tokens = module.tokenizer(batch.captions, padding="max_length", return_tensors="pt").input_ids
    prompt_embeds = module.text_encoder(tokens).last_hidden_state
    output = module.unet(noisy_latents, timesteps, prompt_embeds).sample
    squared_error = (output - scheduler.get_velocity(batch.latents, noise, timesteps)).square()
    alpha = scheduler.alphas_cumprod[timesteps].sqrt().view(3, 1, 1, 1)
    sigma = (1 - alpha.square()).sqrt()
    return squared_error, alpha * noisy_latents - sigma * output, (sigma / (alpha + sigma)).view(3)


def compute_step_loss(module: TextToImageTraining, batch: CaptionedLatentBatch) -> Tensor:
    torch.manual_seed(11)
    return module.training_step(batch, 0)


def test_last_batch_may_hold_one_sample(bundle: Bundle) -> None:
    batch = CaptionedLatentBatch(torch.randn(1, 4, 6, 8), ["a hat"], {"hat": torch.tensor([0])})
    assert compute_step_loss(make_module(bundle), batch).isfinite()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_step_is_the_error_of_the_velocity_at_shifted_times(bundle: Bundle, shift: float) -> None:
    module, batch = make_module(bundle, timestep_shift=shift), make_batch()
    squared_error, _, noise_level = compute_reference(module, batch, shift)
    loss = compute_step_loss(module, batch)
    torch.testing.assert_close(loss, squared_error.mean())
    assert noise_level.std() > 0.01, "the samples differ in their times"
    loss.backward()
    for network in (module.unet, module.text_encoder):
        assert any(parameter.grad.abs().max() > 0 for parameter in network.parameters())


def test_focus_box_weights_its_latents_with_a_mean_of_1(bundle: Bundle) -> None:
    """Top 1/3 to 2/3 of 6 rows are rows 2 and 3, left 1/4 to 1 of 8 columns columns 2 to 7."""
    batch = make_batch()
    module = make_module(bundle, focus_box=(1 / 3, 1 / 4, 2 / 3, 1.0), focus_weight=5.0)
    squared_error, _, _ = compute_reference(module, batch)
    weight = torch.ones(6, 8)
    weight[2:4, 2:8] = 5.0
    expected = (squared_error * weight / weight.mean()).mean()
    torch.testing.assert_close(compute_step_loss(module, batch), expected)
    plain = make_module(bundle, focus_box=(1 / 3, 1 / 4, 2 / 3, 1.0))
    torch.testing.assert_close(compute_step_loss(plain, batch), squared_error.mean())


def test_attribute_loss_counts_less_where_there_is_more_noise(
    bundle: Bundle, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    options = {"channels": 4, "base_channels": 8}
    classifier = AttributeClassifier("latents", 8, {"hat": ["a", "b", "c"]}, options=options)
    classifier.save_pretrained(tmp_path)
    module, batch = (
        make_module(bundle, attribute_classifier=str(tmp_path), attribute_loss_weight=0.7),
        make_batch(),
    )
    squared_error, pred_x0, noise_level = compute_reference(module, batch)
    assert module.attribute_loss.classifier is not None
    logits = module.attribute_loss.classifier(pred_x0).logits["hat"]
    cross_entropy = F.cross_entropy(logits, batch.labels["hat"], reduction="none")  # type: ignore[index]
    expected = squared_error.mean() + (0.7 * (1 - noise_level) * cross_entropy).mean()
    torch.testing.assert_close(compute_step_loss(module, batch), expected)


def test_validation_has_the_same_noise_each_time_and_no_attribute_loss(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch = make_module(bundle), make_batch()
    first, again, other = record_validation(module, monkeypatch, batch, (11, 11, 5))
    squared_error, _, _ = compute_reference(module, batch)
    assert first == again == ("val/loss", pytest.approx(float(squared_error.mean())), 3)
    assert other[1] != first[1]


def test_training_starts_from_another_base(bundle: Bundle) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(bundle.base)
    torch.manual_seed(0)
    module = TextToImageTraining(
        str(bundle.base / "vae"),
        str(bundle.base / "tokenizer"),
        "unused",
        unet={name: pipeline.unet.config[name] for name in UNET},
        text_encoder={name: pipeline.text_encoder.config.to_dict()[name] for name in TEXT_ENCODER}
        | {"num_hidden_layers": pipeline.text_encoder.config.num_hidden_layers},
        start_from=str(bundle.base),
    )
    for network, start in (
        (module.unet, pipeline.unet),
        (module.text_encoder, pipeline.text_encoder),
    ):
        for name, value in start.state_dict().items():
            torch.testing.assert_close(network.state_dict()[name], value.float())


def test_unet_and_text_encoder_are_optimized_at_their_rate(bundle: Bundle) -> None:
    module = make_module(bundle, lr=0.02)
    optimizer = configure_optimizer(module)
    trained = [*module.unet.parameters(), *module.text_encoder.parameters()]
    assert list_parameter_ids(optimizer) == {id(p) for p in trained}
    assert list_rates(optimizer) == {0.02}


def test_captions_are_cut_to_the_length_of_the_text_encoder(bundle: Bundle) -> None:
    module, batch = make_module(bundle), make_batch()
    length = module.tokenizer.model_max_length
    long_batch = replace(batch, captions=["a hat " * length, "", "a cap"])
    cut_batch = replace(batch, captions=["a hat " * (length - 2), "", "a cap"])
    assert len(module.tokenizer(long_batch.captions[0]).input_ids) > length
    torch.testing.assert_close(
        compute_step_loss(module, long_batch), compute_step_loss(module, cut_batch)
    )
