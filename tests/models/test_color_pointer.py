"""``ColorPointer``: 0 at first; then the color of the very pixel that it attends to."""

import pytest
import torch

from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.models.color_pointer import ColorPointer
from hyperlora.models.pair_hypernetwork import PairHypernetwork
from hyperlora.pipelines.pair_to_lora import PairToLora

LAYOUT = LoraLayout(
    (TargetModule("unet.a", 24, 40), TargetModule("unet.block.attn2.to_k", 6, 10)),
    rank=2,
    base="tiny",
)
INSTRUCTION_HEAD = {
    "num_text_tokens": 4,
    "cross_attention_dim": 6,
    "hidden_size": 24,
    "vocabulary": {
        "categories": {"eyes": ["closed"]},
        "color_axes": {"sky": ["black", "red", "blue"]},
    },
}


def test_color_pointer_outputs_zero_at_initialization() -> None:
    color_pointer = ColorPointer(8, 4, 2, [3, 1])
    first, second = color_pointer(
        torch.randn(5, 8), torch.randn(5, 2, 4, 12), torch.randn(5, 2, 4, 12)
    )
    assert first.shape == (5, 3) and second.shape == (5, 1)
    assert first.abs().max() == second.abs().max() == 0


def test_color_pointer_reads_the_attended_pixel() -> None:
    """Of 4 patches with 2 x 2 pixels each, every pixel in turn."""
    encoder = TimmEncoder("resnet10t", 64, patch_pixels=2).eval()
    image = torch.rand(1, 1, 3, 4, 4).repeat_interleave(16, -1).repeat_interleave(16, -2)
    with torch.no_grad():
        tokens = encoder(image).tokens
        pixels = encoder._normalize_images(image[0])[0, :, ::16, ::16].flatten(1).T  # [16, 3]
    assert tokens.shape[2] == 4
    color_pointer = ColorPointer(1, 4, 2, [3])
    colors = []
    with torch.no_grad():
        color_pointer.to_out[0].copy_(torch.eye(3))
        color_pointer.to_q.weight.fill_(100.0)
        color_pointer.color_proj.weight.zero_()
        for pixel in range(16):
            color_pointer.pos_embed.zero_()
            color_pointer.pos_embed[pixel] = 1.0
            (color,) = color_pointer(
                torch.ones(1, 1), torch.zeros_like(tokens[..., -12:]), tokens[..., -12:]
            )
            colors.append(color[0])
    patch_order = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]  # patch by patch
    torch.testing.assert_close(torch.stack(colors), pixels[patch_order], atol=1e-3, rtol=1e-3)


def test_patch_pixels_reject_other_fusions_than_concat() -> None:
    with pytest.raises(InvalidArgumentError, match="expected, got 'difference'"):
        PairHypernetwork(
            LAYOUT,
            20,
            fusion="difference",
            instruction_head=INSTRUCTION_HEAD | {"patch_pixels": 2},
        )


def test_instruction_head_copies_the_attended_color() -> None:
    """Beside the other logits, and averaged over pairs that show it at different positions."""
    network = PairHypernetwork(
        LAYOUT,
        20,
        instruction_head=INSTRUCTION_HEAD | {"patch_pixels": 2, "noise_std": 0.3},
        width=16,
        num_heads=2,
        head_options={"size": 5},
    )
    head = network.instruction_head
    assert head is not None and head.color_pointer is not None
    before, after = (ImageFeatures(torch.rand(3, 2, 4, 20)) for _ in range(2))
    initial_logits = head.eval().forward_logits(network.fuse_pair(before, after))
    assert initial_logits.abs().max() == 0
    with torch.no_grad():
        head.color_pointer.to_out[0].copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))
        head.color_pointer.to_q.weight.zero_()
        head.color_pointer.to_q.bias.zero_()
    logits = head.forward_logits(network.fuse_pair(before, after))
    # zero queries attend to all pixels equally
    mean_color = after.tokens[..., -12:].unflatten(-1, (3, 4)).mean((1, 2, 4))
    torch.testing.assert_close(logits[:, -2:], mean_color[:, [0, 2]])
    assert logits[:, :-2].abs().max() == 0
    head.input_norm.train()  # adds noise, but not to the colors that are read
    torch.testing.assert_close(head.forward_logits(network.fuse_pair(before, after)), logits)


def test_instruction_head_rejects_other_numbers_of_patches() -> None:
    network = PairHypernetwork(
        LAYOUT,
        20,
        instruction_head=INSTRUCTION_HEAD | {"patch_pixels": 2},
        width=16,
        num_heads=2,
        head_options={"size": 5},
    )
    nine_patches = ImageFeatures(torch.rand(1, 1, 9, 20))
    with pytest.raises(InvalidArgumentError, match="expects 4 patches, the encoder gives 9"):
        network(nine_patches, nine_patches)


def test_pair_to_lora_rejects_an_encoder_with_other_patch_pixels() -> None:
    encoder = TimmEncoder("resnet10t", 32, patch_pixels=4)
    network = PairHypernetwork(
        LAYOUT,
        encoder.width,
        instruction_head=INSTRUCTION_HEAD | {"patch_pixels": 2},
        width=16,
        num_heads=2,
        head_options={"size": 5},
    )
    with pytest.raises(
        InvalidArgumentError, match="2×2 pixels of each patch, the encoder returns 4×4"
    ):
        PairToLora(encoder, network)
