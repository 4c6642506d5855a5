"""A widened UNet computes what it did."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hyperlora.training.weight_surgery import widen_unet


def make_unet(first_width: int, deepest_width: int = 40) -> UNet2DConditionModel:
    torch.manual_seed(first_width)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(first_width, deepest_width),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=8,
        time_embedding_dim=64,
    )


def run_unets(*unets: UNet2DConditionModel) -> list[Tensor]:
    """The outputs of all for the same random inputs."""
    torch.manual_seed(0)
    x, prompt_embeds = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 8)
    timesteps = torch.tensor([3, 400, 900])
    with torch.no_grad():
        return [unet(x, timesteps, prompt_embeds).sample for unet in unets]


@pytest.mark.parametrize("factor", [2, 3])
def test_widen_unet_keeps_outputs_and_breaks_symmetry(factor: int) -> None:
    narrow, wide = make_unet(16), make_unet(16 * factor)
    widen_unet(narrow, wide, noise_std=0.0)
    for unet in (narrow, wide):
        # the two norms over deeper channels and a wider skip, whose groups shift
        unet.up_blocks[0].resnets[1].norm1 = nn.Identity()
        unet.up_blocks[1].resnets[0].norm1 = nn.Identity()
    torch.testing.assert_close(*run_unets(narrow, wide), rtol=1e-4, atol=1e-5)
    narrow, wide = make_unet(16), make_unet(16 * factor)
    widen_unet(narrow, wide, noise_std=0.05)
    kernel = wide.conv_in.weight.detach().unflatten(0, (8, factor, -1))
    assert not torch.allclose(kernel[:, 0], kernel[:, 1], rtol=1e-3)


def test_widen_unet_copies_an_equal_unet_exactly() -> None:
    narrow, same = make_unet(16), make_unet(16)
    widen_unet(narrow, same)
    assert torch.equal(*run_unets(narrow, same))


def test_widen_unet_rejects_other_differences() -> None:
    with pytest.raises(ValueError, match="multiple of it, not to 24"):
        widen_unet(make_unet(16), make_unet(24))
    with pytest.raises(ValueError, match="only the first level"):
        widen_unet(make_unet(16), make_unet(32, deepest_width=64))
    with pytest.raises(ValueError, match="other layers"):
        widen_unet(make_unet(16, deepest_width=32), make_unet(32, deepest_width=32))
