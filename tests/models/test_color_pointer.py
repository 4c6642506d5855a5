"""``Pointing``: nothing at first; then the colour of the very place that is pointed at, among an encoder's own."""

import pytest
import torch

from hyperlora.encoders.timm_encoder import VisionEncoder
from hyperlora.errors import BadRequest
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout, Site
from hyperlora.models.instruction_head import Pointing
from hyperlora.models.pair_hypernetwork import ChangeNetwork
from hyperlora.pipelines.pair_to_lora import PairToLora

LAYOUT = LoraLayout((Site("unet.a", 24, 40), Site("unet.block.attn2.to_k", 6, 10)), rank=2, base="tiny")
VOCABULARY = {"choices": {"eyes": ["closed"]}, "mixtures": {"sky": ["black", "red", "blue"]}}
WORDS = {"tokens": 4, "width": 6, "hidden": 24, "vocabulary": VOCABULARY}


def test_nothing_is_read_at_first() -> None:
    pointing = Pointing(8, 4, 2, [3, 1])
    one, two = pointing(torch.randn(5, 8), torch.randn(5, 2, 4, 12), torch.randn(5, 2, 4, 12))
    assert one.shape == (5, 3) and two.shape == (5, 1)
    assert one.abs().max() == two.abs().max() == 0


def test_what_is_pointed_at_is_read() -> None:
    """Of 4 places with 2 x 2 pixels each, every pixel in turn."""
    encoder = VisionEncoder("resnet10t", 64, colours=2).eval()
    picture = torch.rand(1, 1, 3, 4, 4).repeat_interleave(16, -1).repeat_interleave(16, -2)
    with torch.no_grad():
        tokens = encoder(picture).tokens
        seen = encoder._normalized(picture[0])[0, :, ::16, ::16].flatten(1).T  # [16, 3]
    assert tokens.shape[2] == 4
    pointing = Pointing(1, 4, 2, [3])
    found = []
    with torch.no_grad():
        pointing.read[0].copy_(torch.eye(3))
        pointing.ask.weight.fill_(100.0)
        pointing.colour.weight.zero_()
        for pixel in range(16):
            pointing.where.zero_()
            pointing.where[pixel] = 1.0
            (colour,) = pointing(torch.ones(1, 1), torch.zeros_like(tokens[..., -12:]), tokens[..., -12:])
            found.append(colour[0])
    order = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]  # place by place
    torch.testing.assert_close(torch.stack(found), seen[order], atol=1e-3, rtol=1e-3)


def test_words_that_point_need_both_pictures() -> None:
    with pytest.raises(BadRequest, match="expected, got 'difference'"):
        ChangeNetwork(LAYOUT, 20, join="difference", words=WORDS | {"pixels": 2})


def test_a_mixture_says_the_colour_that_is_pointed_at() -> None:
    """Among what else is said, and of pairs that show it in different places."""
    words = WORDS | {"pixels": 2, "noise": 0.3}
    network = ChangeNetwork(LAYOUT, 20, words=words, width=16, heads=2, head_options={"size": 5})
    wording = network.wording
    assert wording is not None and wording.pointing is not None
    before, after = (ImageFeatures(torch.rand(3, 2, 4, 20)) for _ in range(2))
    silent = wording.eval().said(network.joined(before, after))
    assert silent.abs().max() == 0
    with torch.no_grad():
        wording.pointing.read[0].copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))
        wording.pointing.ask.weight.zero_()
        wording.pointing.ask.bias.zero_()
    said = wording.said(network.joined(before, after))
    mean = after.tokens[..., -12:].unflatten(-1, (3, 4)).mean((1, 2, 4))  # looked at everywhere alike
    torch.testing.assert_close(said[:, -2:], mean[:, [0, 2]])
    assert said[:, :-2].abs().max() == 0
    wording.usual.train()
    torch.testing.assert_close(wording.said(network.joined(before, after)), said)  # no noise on what is read


def test_other_places_cannot_be_pointed_at() -> None:
    network = ChangeNetwork(LAYOUT, 20, words=WORDS | {"pixels": 2}, width=16, heads=2, head_options={"size": 5})
    more = ImageFeatures(torch.rand(1, 1, 9, 20))
    with pytest.raises(BadRequest, match="of 4 places, the encoder shows 9"):
        network(more, more)


def test_what_is_pointed_at_is_what_the_encoder_shows() -> None:
    encoder = VisionEncoder("resnet10t", 32, colours=4)
    network = ChangeNetwork(
        LAYOUT, encoder.width, words=WORDS | {"pixels": 2}, width=16, heads=2, head_options={"size": 5}
    )
    with pytest.raises(BadRequest, match="2×2 pixels of each place, the encoder shows 4×4"):
        PairToLora(encoder, network)
