"""``ColorPointer``: nothing at first; then the colour of the very place that is pointed at, among an encoder's own."""

import pytest
import torch

from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.models.instruction_head import ColorPointer
from hyperlora.models.pair_hypernetwork import PairHypernetwork
from hyperlora.pipelines.pair_to_lora import PairToLora

LAYOUT = LoraLayout(
    (TargetModule("unet.a", 24, 40), TargetModule("unet.block.attn2.to_k", 6, 10)),
    rank=2,
    base="tiny",
)
VOCABULARY = {"choices": {"eyes": ["closed"]}, "mixtures": {"sky": ["black", "red", "blue"]}}
WORDS = {"tokens": 4, "width": 6, "hidden": 24, "vocabulary": VOCABULARY}


def test_nothing_is_read_at_first() -> None:
    pointing = ColorPointer(8, 4, 2, [3, 1])
    one, two = pointing(torch.randn(5, 8), torch.randn(5, 2, 4, 12), torch.randn(5, 2, 4, 12))
    assert one.shape == (5, 3) and two.shape == (5, 1)
    assert one.abs().max() == two.abs().max() == 0


def test_what_is_pointed_at_is_read() -> None:
    """Of 4 places with 2 x 2 pixels each, every pixel in turn."""
    encoder = TimmEncoder("resnet10t", 64, patch_pixels=2).eval()
    picture = torch.rand(1, 1, 3, 4, 4).repeat_interleave(16, -1).repeat_interleave(16, -2)
    with torch.no_grad():
        tokens = encoder(picture).tokens
        seen = encoder._normalize_images(picture[0])[0, :, ::16, ::16].flatten(1).T  # [16, 3]
    assert tokens.shape[2] == 4
    pointing = ColorPointer(1, 4, 2, [3])
    found = []
    with torch.no_grad():
        pointing.to_out[0].copy_(torch.eye(3))
        pointing.to_q.weight.fill_(100.0)
        pointing.color_proj.weight.zero_()
        for pixel in range(16):
            pointing.pos_embed.zero_()
            pointing.pos_embed[pixel] = 1.0
            (colour,) = pointing(
                torch.ones(1, 1), torch.zeros_like(tokens[..., -12:]), tokens[..., -12:]
            )
            found.append(colour[0])
    order = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]  # place by place
    torch.testing.assert_close(torch.stack(found), seen[order], atol=1e-3, rtol=1e-3)


def test_words_that_point_need_both_pictures() -> None:
    with pytest.raises(InvalidArgumentError, match="expected, got 'difference'"):
        PairHypernetwork(LAYOUT, 20, fusion="difference", instruction_head=WORDS | {"pixels": 2})


def test_a_mixture_says_the_colour_that_is_pointed_at() -> None:
    """Among what else is said, and of pairs that show it in different places."""
    words = WORDS | {"pixels": 2, "noise": 0.3}
    network = PairHypernetwork(
        LAYOUT, 20, instruction_head=words, width=16, heads=2, head_options={"size": 5}
    )
    wording = network.instruction_head
    assert wording is not None and wording.color_pointer is not None
    before, after = (ImageFeatures(torch.rand(3, 2, 4, 20)) for _ in range(2))
    silent = wording.eval().forward_logits(network.fuse_pair(before, after))
    assert silent.abs().max() == 0
    with torch.no_grad():
        wording.color_pointer.to_out[0].copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))
        wording.color_pointer.to_q.weight.zero_()
        wording.color_pointer.to_q.bias.zero_()
    said = wording.forward_logits(network.fuse_pair(before, after))
    mean = (
        after.tokens[..., -12:].unflatten(-1, (3, 4)).mean((1, 2, 4))
    )  # looked at everywhere alike
    torch.testing.assert_close(said[:, -2:], mean[:, [0, 2]])
    assert said[:, :-2].abs().max() == 0
    wording.input_norm.train()
    torch.testing.assert_close(
        wording.forward_logits(network.fuse_pair(before, after)), said
    )  # no noise on what is read


def test_other_places_cannot_be_pointed_at() -> None:
    network = PairHypernetwork(
        LAYOUT,
        20,
        instruction_head=WORDS | {"pixels": 2},
        width=16,
        heads=2,
        head_options={"size": 5},
    )
    more = ImageFeatures(torch.rand(1, 1, 9, 20))
    with pytest.raises(InvalidArgumentError, match="of 4 places, the encoder shows 9"):
        network(more, more)


def test_what_is_pointed_at_is_what_the_encoder_shows() -> None:
    encoder = TimmEncoder("resnet10t", 32, patch_pixels=4)
    network = PairHypernetwork(
        LAYOUT,
        encoder.width,
        instruction_head=WORDS | {"pixels": 2},
        width=16,
        heads=2,
        head_options={"size": 5},
    )
    with pytest.raises(
        InvalidArgumentError, match="2×2 pixels of each place, the encoder shows 4×4"
    ):
        PairToLora(encoder, network)
