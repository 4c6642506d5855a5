"""A pruned UNet: the channels that stay compute what they did, and new inputs have no effect at first."""

import pytest
import torch
from diffusers import UNet2DConditionModel as UNet

from hyperlora.training.weight_surgery import prune_unet


def unet(deepest, in_channels=4, first=16):
    torch.manual_seed(0)
    return UNet(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(first, 24, deepest),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def said(model, x):
    text = torch.randn(len(x), 3, 16, generator=torch.Generator().manual_seed(1))
    return model(x, torch.tensor([300] * len(x)), encoder_hidden_states=text).sample


@torch.no_grad()
def test_outer_levels_stay_as_they_were():
    wide, narrow = unet(32), unet(16)
    prune_unet(wide, narrow)
    for name, value in narrow.state_dict().items():
        if name.startswith(("down_blocks.0", "conv_out", "time_embedding")):
            torch.testing.assert_close(value, wide.state_dict()[name])


@torch.no_grad()
def test_new_inputs_have_no_effect_at_first():
    wide, more = unet(32), unet(32, in_channels=8)
    prune_unet(wide, more)
    x = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(said(more, x), said(wide, x[:, :4]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_is_written_to_most_stays():
    wide, narrow = unet(32), unet(16)
    blocks = [*wide.down_blocks[-1].resnets, *wide.mid_block.resnets, *wide.up_blocks[0].resnets]
    loud = torch.tensor(
        [i for i in range(32) if i % 8 >= 4]
    )  # the second half of each of the 4 groups
    for block in blocks:
        block.conv2.weight[loud] *= 10
    prune_unet(wide, narrow)
    torch.testing.assert_close(
        narrow.mid_block.resnets[0].conv2.bias, wide.mid_block.resnets[0].conv2.bias[loud]
    )
    torch.testing.assert_close(
        narrow.mid_block.resnets[0].conv2.weight,
        wide.mid_block.resnets[0].conv2.weight[loud][:, loud],
    )


def test_levels_that_cannot_shrink_are_refused():
    with pytest.raises(ValueError, match="only the deepest level can shrink"):
        prune_unet(unet(32), unet(32, first=8))
    with pytest.raises(ValueError, match="only the deepest level can shrink"):
        prune_unet(unet(16), unet(32))
