"""Encoders: timm backbones, the UNet of the base, attribute classifiers."""

import shutil

import pytest
import torch

from hyperlora import pretrained
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base, make_unet_encoder
from hyperlora.encoders.attribute_classifier import AttributeClassifier, load_image_encoder
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError, ModelLoadError
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.model_card import ModelCard


@pytest.fixture
def base(bundle):
    return load_diffusion_base(bundle.base)


@pytest.mark.parametrize("name", ["regnetx_002", "vit_tiny_patch16_224"])
def test_timm_encoder_gives_tokens_per_view(name):
    options = {"img_size": 32, "depth": 1} if name.startswith("vit") else {}
    encoder = TimmEncoder(name, 32, options=options).eval()
    photos = torch.rand(2, 3, 3, 40, 40)
    with torch.no_grad():
        tokens = encoder(photos).tokens
        single_tokens = encoder(photos[1:, 2:]).tokens
    assert tokens.shape[:2] == (2, 3)
    assert tokens.shape[-1] == encoder.width
    assert torch.allclose(tokens[1, 2], single_tokens[0, 0], atol=1e-4)


def test_unet_encoder_leaves_the_base_unchanged(base):
    encoder = make_unet_encoder(base)
    photos = torch.rand(2, 2, 3, 20, 20)
    tokens = encoder(photos).tokens
    assert tokens.shape == (2, 2, 64, encoder.width)
    assert torch.equal(tokens, encoder(photos).tokens), "the same noise every time"
    assert not torch.allclose(tokens[0, 0], tokens[1, 0], atol=1e-3)
    assert not any(module._forward_hooks for module in base.denoiser.modules())
    assert not encoder.state_dict(), "the modules of the base are not registered"


def test_from_pretrained_restores_a_model_with_unet_encoder(base, bundle, tmp_path):
    shutil.copytree(bundle.base, tmp_path / "base")
    own_base = DiffusionBase("/".join((tmp_path / "base").parts[-2:]), base.pipeline)
    layout = ImageToLora.from_pretrained(bundle.model).layout
    layout = type(layout)(layout.targets, layout.rank, own_base.id)
    encoder = make_unet_encoder(own_base)
    network = Hypernetwork(
        layout, encoder.width, width=16, depth=1, num_heads=2, head_options={"size": 4}
    )
    with torch.no_grad():
        network.code_proj.normal_(std=0.1)
    model = ImageToLora(encoder, network, ModelCard(base="../base")).eval()
    model.save_pretrained(tmp_path / "model")
    photos = torch.rand(1, 1, 3, 16, 16)
    with torch.no_grad():
        expected = model.forward(photos).flatten()
        for options in ({}, {"base": own_base}):
            restored = ImageToLora.from_pretrained(tmp_path / "model", **options)
            assert torch.allclose(
                restored.forward(photos).flatten(), expected, atol=2e-3
            )  # stored as float16
    with pytest.raises(LayoutMismatchError, match="use its own base"):
        ImageToLora.from_pretrained(
            tmp_path / "model", base=DiffusionBase("another/base", base.pipeline)
        )


def test_attribute_classifier_from_pretrained_restores_it(bundle, tmp_path):
    classifier = AttributeClassifier.from_pretrained(bundle.evaluator)
    classifier.save_pretrained(tmp_path)
    restored, images = AttributeClassifier.from_pretrained(tmp_path), torch.rand(3, 3, 16, 16)
    expected, prediction = classifier(images), restored(images)
    assert torch.equal(expected.identity, prediction.identity)
    assert restored.predict_labels(prediction) == classifier.predict_labels(expected)
    assert torch.allclose(expected.identity.norm(dim=-1), torch.ones(3), atol=1e-5)
    with pytest.raises(ModelLoadError, match="no attribute classifier"):
        AttributeClassifier.from_pretrained(tmp_path / "nothing")


def test_patch_pixels_belong_to_the_token_of_their_patch():
    encoder = TimmEncoder("regnetx_002", 64, patch_pixels=2).eval()
    red_corner = torch.zeros(1, 1, 3, 64, 64)
    red_corner[..., 0, :16, :16] = 1
    with torch.no_grad():
        black_tokens, tokens = (
            encoder(torch.zeros_like(red_corner)).tokens,
            encoder(red_corner).tokens,
        )
    assert tokens.shape == (1, 1, 4, encoder.width)
    changed = (tokens - black_tokens)[0, 0, :, -12:].abs() > 0.1
    assert changed.nonzero().tolist() == [[0, 0]], "one color of the first pixel of the first token"
    assert TimmEncoder(**encoder.config).width == encoder.width


def test_patch_pixels_need_a_feature_map():
    encoder = TimmEncoder(
        "vit_tiny_patch16_224", 32, options={"img_size": 32, "depth": 1}, patch_pixels=2
    )
    with pytest.raises(InvalidArgumentError, match="feature map"):
        encoder(torch.rand(1, 1, 3, 32, 32))


def test_load_image_encoder_adds_patch_pixels_to_a_classifier(tmp_path):
    classifier = AttributeClassifier("regnetx_002", 64, {"hat": ["none", "hat"]})
    classifier.save_pretrained(tmp_path)
    encoder = load_image_encoder(str(tmp_path))
    patch_encoder = load_image_encoder(str(tmp_path), {"patch_pixels": 4})
    photos = torch.rand(1, 1, 3, 64, 64)
    with torch.no_grad():
        tokens, patch_tokens = encoder(photos).tokens, patch_encoder(photos).tokens
    assert torch.equal(patch_tokens[..., : encoder.width], tokens)
    assert patch_encoder.width == encoder.width + 48


def test_load_image_encoder_reads_that_of_a_released_model():
    folder = pretrained.IMAGE_TO_LORA_DIR
    encoder = load_image_encoder(str(folder))
    photos = torch.rand(1, 2, 3, 64, 64)
    expected = ImageToLora.from_pretrained(folder).encoder(photos).tokens
    assert torch.equal(encoder(photos).tokens, expected)


def test_load_image_encoder_refuses_a_model_that_shares_its_encoder():
    with pytest.raises(ModelLoadError, match="holds no encoder of its own"):
        load_image_encoder(str(pretrained.PAIR_TO_LORA_DIR))
