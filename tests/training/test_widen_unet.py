"""A UNet made wider computes what it did."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from hyperlora.training.weight_surgery import widen_unet


def unet(first: int, hidden: int = 40, time: int = 64, groups: int = 8) -> UNet2DConditionModel:
    torch.manual_seed(first)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(first, hidden),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=groups,
        time_embedding_dim=time,
    )


def outputs(*models: UNet2DConditionModel) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x, text, steps = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 8), torch.tensor([3, 400, 900])
    with torch.no_grad():
        return [model(x, steps, text).sample for model in models]


@pytest.mark.parametrize("times", [2, 3])
def test_it_computes_the_same_and_can_learn_more(times: int) -> None:
    narrow, wide = unet(16), unet(16 * times)
    widen_unet(narrow, wide, noise_std=0.0)
    for model in (
        narrow,
        wide,
    ):  # the two norms over hidden channels and a wider skip, whose groups shift
        model.up_blocks[0].resnets[1].norm1 = model.up_blocks[1].resnets[0].norm1 = (
            torch.nn.Identity()
        )
    torch.testing.assert_close(*outputs(narrow, wide), rtol=1e-4, atol=1e-5)
    narrow, wide = unet(16), unet(16 * times)
    widen_unet(narrow, wide, noise_std=0.05)
    kernel = wide.conv_in.weight.detach().unflatten(0, (8, times, -1))
    assert not torch.allclose(kernel[:, 0], kernel[:, 1], rtol=1e-3)


def test_it_is_exact_when_nothing_grows() -> None:
    narrow, same = unet(16), unet(16)
    widen_unet(narrow, same)
    assert torch.equal(*outputs(narrow, same))


def test_what_cannot_grow_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of it, not to 24"):
        widen_unet(unet(16), unet(24))
    with pytest.raises(ValueError, match="only the first level"):
        widen_unet(unet(16), unet(32, hidden=64))
    with pytest.raises(ValueError, match="other layers"):
        widen_unet(unet(16, hidden=32), unet(32, hidden=32))
