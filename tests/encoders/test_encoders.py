"""Encoders: timm backbones, and the base itself."""

import shutil

import pytest
import torch

from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base, make_unet_encoder
from hyperlora.encoders.attribute_classifier import AttributeClassifier, load_image_encoder
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError, ModelLoadError
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.pipelines.image_to_lora import ImageToLora


@pytest.fixture
def base(bundle):
    return load_diffusion_base(bundle.base)


@pytest.mark.parametrize("name", ["regnetx_002", "vit_tiny_patch16_224"])
def test_any_timm_backbone_gives_tokens_per_view(name):
    options = {"img_size": 32, "depth": 1} if name.startswith("vit") else {}
    encoder = TimmEncoder(name, 32, options=options).eval()
    photos = torch.rand(2, 3, 3, 40, 40)
    with torch.no_grad():
        tokens = encoder(photos).tokens
        alone = encoder(photos[1:, 2:]).tokens
    assert tokens.shape[:2] == (2, 3)
    assert tokens.shape[-1] == encoder.width
    assert torch.allclose(tokens[1, 2], alone[0, 0], atol=1e-4)


def test_the_base_sees_photos_and_stays_as_it_was(base):
    encoder = make_unet_encoder(base)
    photos = torch.rand(2, 2, 3, 20, 20)
    tokens = encoder(photos).tokens
    assert tokens.shape == (2, 2, 64, encoder.width)
    assert torch.equal(tokens, encoder(photos).tokens), "the same noise every time"
    assert not torch.allclose(tokens[0, 0], tokens[1, 0], atol=1e-3)
    assert not any(module._forward_hooks for module in base.denoiser.modules())
    assert not encoder.state_dict(), "the base is held, not owned"


def test_a_model_that_looks_through_its_base_comes_back_the_same(base, bundle, tmp_path):
    shutil.copytree(bundle.base, tmp_path / "base")
    mine = DiffusionBase("/".join((tmp_path / "base").parts[-2:]), base.pipeline)
    layout = ImageToLora.from_pretrained(bundle.model).layout
    layout = type(layout)(layout.targets, layout.rank, mine.id)
    encoder = make_unet_encoder(mine)
    network = Hypernetwork(
        layout, encoder.width, width=16, depth=1, num_heads=2, head_options={"size": 4}
    )
    with torch.no_grad():
        network.code_proj.normal_(std=0.1)
    made = ImageToLora(encoder, network, {"base": "../base"}).eval()
    made.save_pretrained(tmp_path / "model")
    photos = torch.rand(1, 1, 3, 16, 16)
    with torch.no_grad():
        expected = made.forward(photos).flatten()
        for options in ({}, {"base": mine}):
            found = ImageToLora.from_pretrained(tmp_path / "model", **options)
            assert torch.allclose(
                found.forward(photos).flatten(), expected, atol=2e-3
            )  # stored as float16
    with pytest.raises(LayoutMismatchError, match="use its own base"):
        ImageToLora.from_pretrained(
            tmp_path / "model", base=DiffusionBase("another/base", base.pipeline)
        )


def test_readers_come_back_the_same(bundle, tmp_path):
    reader = AttributeClassifier.from_pretrained(bundle.evaluator)
    reader.save_pretrained(tmp_path)
    again, images = AttributeClassifier.from_pretrained(tmp_path), torch.rand(3, 3, 16, 16)
    one, two = reader(images), again(images)
    assert torch.equal(one.identity, two.identity)
    assert again.predict_labels(two) == reader.predict_labels(one)
    assert torch.allclose(one.identity.norm(dim=-1), torch.ones(3), atol=1e-5)
    with pytest.raises(ModelLoadError, match="no reader"):
        AttributeClassifier.from_pretrained(tmp_path / "nothing")


def test_colours_stand_beside_the_token_of_their_place():
    encoder = TimmEncoder("regnetx_002", 64, patch_pixels=2).eval()
    red_corner = torch.zeros(1, 1, 3, 64, 64)
    red_corner[..., 0, :16, :16] = 1
    with torch.no_grad():
        plain, tokens = encoder(torch.zeros_like(red_corner)).tokens, encoder(red_corner).tokens
    assert tokens.shape == (1, 1, 4, encoder.width)
    changed = (tokens - plain)[0, 0, :, -12:].abs() > 0.1
    assert changed.nonzero().tolist() == [[0, 0]], (
        "one colour of the first pixel of the first token"
    )
    assert TimmEncoder(**encoder.config).width == encoder.width


def test_a_backbone_without_a_map_has_no_place_for_colours():
    encoder = TimmEncoder(
        "vit_tiny_patch16_224", 32, options={"img_size": 32, "depth": 1}, patch_pixels=2
    )
    with pytest.raises(InvalidArgumentError, match="feature map"):
        encoder(torch.rand(1, 1, 3, 32, 32))


def test_a_reader_lends_its_sight_with_colours(tmp_path):
    reader = AttributeClassifier("regnetx_002", 64, {"hat": ["none", "hat"]})
    reader.save_pretrained(tmp_path)
    plain, coloured = (
        load_image_encoder(str(tmp_path)),
        load_image_encoder(str(tmp_path), {"colours": 4}),
    )
    photos = torch.rand(1, 1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(coloured(photos).tokens[..., : plain.width], plain(photos).tokens)
    assert coloured.width == plain.width + 48
