"""What a step of the training of a diffusion over LoRAs computes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.normalization import LoraNormalizer
from hyperlora.models.lora_autoencoder import LoraAutoencoder
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.image_to_lora_base import EncodedPhotos
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.pipelines.lora_diffusion import LoraDiffusion
from hyperlora.pretrained import FACE_PACK_DIR
from hyperlora.training.batches import LoraPhotoBatch
from hyperlora.training.modules.lora_diffusion import LoraDiffusionTraining, _compute_image_shape
from tests.training.config_rules import TINY_VIT
from tests.training.module_checks import configure_optimizer, list_parameter_ids, list_rates

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # there is no trainer to log to


@pytest.fixture(scope="module")
def codec_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = LoraLayout((TargetModule("unet.a", 6, 8), TargetModule("unet.b", 8, 4)), 2, "tiny")
    autoencoder = LoraAutoencoder(layout, directions_per_factor=4, latent_width=3, width=8)
    folder = tmp_path_factory.mktemp("codec")
    LoraCodec(LoraNormalizer(layout), autoencoder).save_pretrained(folder)
    return folder


def make_module(codec_dir: Path, **options: Any) -> LoraDiffusionTraining:
    torch.manual_seed(0)
    module = LoraDiffusionTraining(
        str(codec_dir),
        "vit_tiny_patch16_224",
        "unused",
        encoder_options={"image_size": 16, "options": TINY_VIT},
        mixture={"width": 8, "num_tokens": 2} | options.pop("mixture", {}),
        denoiser={"width": 8, "depth": 1, "num_heads": 2},
        **options,
    )
    for parameter in module.model.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def make_batch(num_loras: int = 2) -> LoraPhotoBatch:
    torch.manual_seed(1)
    return LoraPhotoBatch(
        torch.randn(num_loras, 2, 3),
        torch.randn(num_loras, 1, 1, 512),
        torch.randn(num_loras, 1, 5, 16),
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Inputs and output of each call of the denoiser."""
    from hyperlora.models.lora_dit import LoraDiT

    recorded: list[dict[str, Any]] = []
    forward = LoraDiT.forward

    def record(
        model: LoraDiT, x: Any, t: Any, features: Any, drop_mask: Any = None, mean: Any = None
    ) -> Any:
        output = forward(model, x, t, features, drop_mask, mean)
        call = {"x": x, "t": t, "drop_mask": drop_mask, "mean": mean, "output": output}
        recorded.append(call)
        return output

    monkeypatch.setattr(LoraDiT, "forward", record)
    return recorded


def test_loss_is_the_error_of_the_clean_latents(codec_dir: Path, calls: list[Any]) -> None:
    batch = make_batch()
    loss = make_module(codec_dir).training_step(batch, 0)
    expected = (calls[0]["output"] - batch.latents).square().mean()
    torch.testing.assert_close(loss, expected)
    # x_t - x = t (ε - x): parallel to the noise that was drawn, and 0 at t = 0
    noise = (calls[0]["x"] - (1 - calls[0]["t"][:, None, None]) * batch.latents) / calls[0]["t"][
        :, None, None
    ]
    assert 0.3 < float(noise.std()) < 3


def test_timestep_shift_draws_noisier_times(codec_dir: Path, calls: list[Any]) -> None:
    batch = make_batch(512)
    for shift in (1.0, 4.0):
        torch.manual_seed(2)
        make_module(codec_dir, timestep_shift=shift).training_step(batch, 0)
    plain, shifted = (call["t"] for call in calls)
    assert float(plain.mean()) == pytest.approx(0.5, abs=0.06)
    # the mean of s u / (1 + (s - 1) u) over u is s / (s - 1) (1 - ln s / (s - 1))
    assert float(shifted.mean()) == pytest.approx(4 / 3 * (1 - 1.3863 / 3), abs=0.06)


@pytest.mark.parametrize("prob", [0.0, 1.0, 0.25])
def test_photos_are_dropped_with_their_probability(
    codec_dir: Path, calls: list[Any], prob: float
) -> None:
    make_module(codec_dir, cond_dropout_prob=prob).training_step(make_batch(512), 0)
    share = float(calls[0]["drop_mask"].float().mean())
    assert share == pytest.approx(prob, abs=0.08 * (0 < prob < 1))


def test_regression_is_fitted_before_the_first_step(codec_dir: Path, tmp_path: Path) -> None:
    """Latents that are a linear function of the photo are found without a single step."""
    torch.manual_seed(2)
    num_loras, matrix = 200, torch.randn(5 * 16, 6) / 8
    images = torch.randn(num_loras, 1, 5, 16)
    latents = (images.flatten(1) @ matrix).unflatten(1, (2, 3))
    faces = torch.zeros(num_loras, 1, 1, 512)
    loader = DataLoader(
        TensorDataset(latents, faces, images),
        50,
        collate_fn=lambda rows: LoraPhotoBatch(*map(torch.stack, zip(*rows, strict=True))),
    )
    output_dir = tmp_path / "model"
    module = make_module(codec_dir, regression_rank=6)
    module.hparams["output_dir"] = str(output_dir)
    torch.nn.init.zeros_(module.model.denoiser.final_layer.weight)
    torch.nn.init.zeros_(module.model.denoiser.final_layer.bias)
    module.hparams["lr"] = 0.0
    trainer = L.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(module, loader)
    model = LoraDiffusion.from_pretrained(output_dir)
    assert model.regression is not None and model.regression.config["rank"] == 6
    features = EncodedPhotos(ImageFeatures(images[:3]), ImageFeatures(faces[:3]))
    for guidance_scale in (1.0, 2.0):  # a network of 0 predicts the mean alone
        generated = model.generate_from_features(features, LoraSampling(0, 1, guidance_scale))
        expected = model.codec.decode(guidance_scale * latents[:3])
        scale = float(expected.flatten().std())
        difference = generated.flatten() - expected.flatten()
        assert float(difference.std()) < 0.1 * scale


def test_regression_is_fitted_once_to_faces_and_images_of_all_batches(codec_dir: Path) -> None:
    options = {"regression_rank": 4, "face_pack": str(FACE_PACK_DIR)}
    module, other = make_module(codec_dir, **options), make_module(codec_dir, **options)
    batches = [make_batch(30), make_batch(20)]
    batches[1].latents.neg_()
    strategy = SimpleNamespace(broadcast=lambda buffer: 1 * buffer)
    for each in (module, other, plain := make_module(codec_dir)):
        each._trainer = SimpleNamespace(train_dataloader=batches, strategy=strategy)
        each.on_train_start()
    assert plain.model.regression is None
    regression, expected = module.model.regression, other.model.regression
    assert regression is not None and expected is not None and regression.has_coefficients
    vectors = [
        torch.cat([batch.image_features.flatten(2), batch.face_features.flatten(2)], -1)
        for batch in batches
    ]
    expected.fit(torch.cat(vectors), torch.cat([batch.latents for batch in batches]))
    for name, buffer in regression.named_buffers():
        torch.testing.assert_close(buffer, expected.get_buffer(name))
        buffer.add_(1.0)
    before = regression.down.clone()
    module.on_train_start()
    assert torch.equal(regression.down, before), "a checkpoint holds the coefficients"


@pytest.mark.parametrize("mode", ["gate", "image", "face"])
def test_regression_sees_what_the_mixture_sees(codec_dir: Path, mode: str) -> None:
    module = make_module(
        codec_dir, regression_rank=4, face_pack=str(FACE_PACK_DIR), mixture={"mode": mode}
    )
    regression = module.model.regression
    assert regression is not None
    torch.nn.init.normal_(regression.down)
    torch.nn.init.normal_(regression.up)
    batch = make_batch()
    faces, images = ImageFeatures(batch.face_features), ImageFeatures(batch.image_features)
    mean = regression(faces, images)
    other_faces = regression(ImageFeatures(faces.tokens + 1), images)
    other_images = regression(faces, ImageFeatures(images.tokens + 1))
    assert torch.equal(mean, other_faces) == (mode == "image")
    assert torch.equal(mean, other_images) == (mode == "face")


def test_training_step_gives_the_estimate_to_the_denoiser(
    codec_dir: Path, calls: list[Any]
) -> None:
    module = make_module(codec_dir, regression_rank=4, cond_dropout_prob=0.0)
    regression = module.model.regression
    assert regression is not None
    module.training_step(make_batch(), 0)
    assert not calls[0]["mean"].any()  # no fit yet
    torch.nn.init.normal_(regression.down)
    torch.nn.init.normal_(regression.up)
    module.training_step(make_batch(), 0)
    batch = make_batch()
    mean = regression(ImageFeatures(batch.face_features), ImageFeatures(batch.image_features))
    torch.testing.assert_close(calls[1]["mean"], mean)


def make_regressing_module(codec_dir: Path, **options: Any) -> LoraDiffusionTraining:
    """A module whose regression sees faces and images, and is fitted."""
    options = {"regression_rank": 4, "face_pack": str(FACE_PACK_DIR), **options}
    module = make_module(codec_dir, mixture={"mode": "gate"}, **options)
    regression = module.model.regression
    assert regression is not None
    torch.nn.init.normal_(regression.down, std=0.1)
    torch.nn.init.normal_(regression.up, std=0.1)
    return module


def make_views(num_views: int = 3) -> LoraPhotoBatch:
    torch.manual_seed(1)
    return LoraPhotoBatch(
        torch.randn(2, 2, 3), torch.randn(2, num_views, 1, 512), torch.randn(2, num_views, 5, 16)
    )


def test_validation_compares_a_sample_of_one_photo_with_its_own_and_another_lora(
    codec_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperlora.lora.merge import compare_deltas

    module, batch, logged = make_regressing_module(codec_dir), make_views(), {}
    monkeypatch.setattr(
        module, "log_dict", lambda values, **options: logged.update({**values, **options})
    )
    state = torch.random.get_rng_state()
    first = LoraPhotoBatch(batch.latents, batch.face_features[:, :1], batch.image_features[:, :1])
    with torch.no_grad():
        module.validation_step(batch, 6)
        assert torch.equal(torch.random.get_rng_state(), state)
        features, gate = module._mix_features(first, 1)
        mean = module._estimate_mean(first, 1)
        torch.manual_seed(6)
        loss = module._compute_loss(batch.latents, features, None, mean)
        noise = torch.randn(2, 2, 3)
        samples = module.model.codec.decode(
            module.model.denoiser.sample(features, noise, mean=mean)
        )
        targets = module.model.codec.decode(batch.latents)
    assert logged["sync_dist"] is True
    assert float(logged["val/loss"]) == pytest.approx(float(loss))
    own, shuffled = compare_deltas(targets, samples)[1], compare_deltas(targets[[1, 0]], samples)[1]
    assert float(logged["val/cosine_own"]) == pytest.approx(float(own.mean()), abs=1e-5)
    assert float(logged["val/cosine_shuffled"]) == pytest.approx(float(shuffled.mean()), abs=1e-5)
    assert abs(float(own.mean() - shuffled.mean())) > 1e-3
    assert float(logged["val/face_gate"]) == pytest.approx(float(gate.mean()))
    assert logged["batch_size"] == 2


def test_number_of_photos_is_drawn_for_features_and_estimate(
    codec_dir: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch, counts = make_regressing_module(codec_dir), make_views(), []
    mix = module.model.mixture.forward_with_gate

    def record(faces: ImageFeatures, images: ImageFeatures) -> Any:
        counts.append(images.tokens.shape[1])
        assert torch.equal(images.tokens, batch.image_features[:, : counts[-1]])
        assert torch.equal(faces.tokens, batch.face_features[:, : counts[-1]])
        return mix(faces, images)

    monkeypatch.setattr(module.model.mixture, "forward_with_gate", record)
    for seed in range(12):
        torch.manual_seed(seed)
        num_views = int(torch.randint(1, 4, ()))
        torch.manual_seed(seed)
        module.training_step(batch, 0)
        assert counts[-1] == num_views
        torch.testing.assert_close(calls[-1]["mean"], module._estimate_mean(batch, num_views))
    assert set(counts) == {1, 2, 3}
    one, all_views = (module._estimate_mean(batch, n) for n in (1, 3))
    assert one is not None and not torch.allclose(one, all_views, atol=1e-3)


def test_default_options_and_what_is_optimized(codec_dir: Path) -> None:
    module = make_module(codec_dir, lr=0.02)
    hparams = module.hparams
    assert hparams["cond_dropout_prob"] == 0.1 and hparams["timestep_shift"] == 2.0
    optimizer = configure_optimizer(module)
    expected = [*module.model.mixture.parameters(), *module.model.denoiser.parameters()]
    assert list_parameter_ids(optimizer) == {id(p) for p in expected}
    assert list_rates(optimizer) == {0.02}


def test_shape_of_features_leaves_the_encoder_as_it_is() -> None:
    """The image that it is measured by is no data for a batch norm."""
    encoder = TimmEncoder("resnet10t", 32, pretrained=False)
    for is_training in (True, False):
        encoder.train(is_training)
        state = {name: value.clone() for name, value in encoder.state_dict().items()}
        num_tokens, width = _compute_image_shape(encoder)
        assert encoder.training == is_training
        assert all(torch.equal(encoder.state_dict()[name], state[name]) for name in state)
        with torch.no_grad():
            tokens = encoder.eval()(torch.rand(1, 1, 3, 32, 32)).tokens
        assert tokens.shape[2:] == (num_tokens, width)
