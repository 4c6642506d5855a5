"""A pruned UNet: kept channels compute what they did, and new inputs have no effect at first."""

import pytest
import torch
from diffusers import UNet2DConditionModel as UNet
from torch import Tensor

from hyperlora.training.weight_surgery import prune_unet


def make_unet(deepest_width: int, in_channels: int = 4, first_width: int = 16) -> UNet:
    torch.manual_seed(0)
    return UNet(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(first_width, 24, deepest_width),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def run_unet(unet: UNet, x: Tensor) -> Tensor:
    prompt_embeds = torch.randn(len(x), 3, 16, generator=torch.Generator().manual_seed(1))
    return unet(x, torch.tensor([300] * len(x)), encoder_hidden_states=prompt_embeds).sample


@torch.no_grad()
def test_prune_unet_keeps_the_outer_levels() -> None:
    wide, narrow = make_unet(32), make_unet(16)
    prune_unet(wide, narrow)
    for name, value in narrow.state_dict().items():
        if name.startswith(("down_blocks.0", "conv_out", "time_embedding")):
            torch.testing.assert_close(value, wide.state_dict()[name])


@torch.no_grad()
def test_prune_unet_gives_new_inputs_no_effect() -> None:
    unet, unet_with_inputs = make_unet(32), make_unet(32, in_channels=8)
    prune_unet(unet, unet_with_inputs)
    x = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(
        run_unet(unet_with_inputs, x), run_unet(unet, x[:, :4]), atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_prune_unet_keeps_the_channels_with_the_largest_weights() -> None:
    wide, narrow = make_unet(32), make_unet(16)
    blocks = [*wide.down_blocks[-1].resnets, *wide.mid_block.resnets, *wide.up_blocks[0].resnets]
    # the second half of each of the 4 groups
    large_channels = torch.tensor([i for i in range(32) if i % 8 >= 4])
    for block in blocks:
        block.conv2.weight[large_channels] *= 10
    prune_unet(wide, narrow)
    wide_conv, narrow_conv = wide.mid_block.resnets[0].conv2, narrow.mid_block.resnets[0].conv2
    torch.testing.assert_close(narrow_conv.bias, wide_conv.bias[large_channels])
    torch.testing.assert_close(
        narrow_conv.weight, wide_conv.weight[large_channels][:, large_channels]
    )


def test_prune_unet_rejects_other_differences() -> None:
    with pytest.raises(ValueError, match="only the deepest level can shrink"):
        prune_unet(make_unet(32), make_unet(32, first_width=8))
    with pytest.raises(ValueError, match="only the deepest level can shrink"):
        prune_unet(make_unet(16), make_unet(32))
