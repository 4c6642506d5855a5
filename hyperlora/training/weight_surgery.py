"""Start a UNet from a trained one that is wider at its deepest level and reads fewer input channels."""

import torch
from diffusers import UNet2DConditionModel as UNet
from torch import Tensor


@torch.no_grad()
def prune_unet(wide: UNet, narrow: UNet) -> None:
    """Set the weights of ``narrow``, which differs from ``wide`` in ``block_out_channels[-1]``, smaller, and in
    ``in_channels``, larger. At the deepest level those channels of every normalisation group stay that are written to
    most (structured pruning, 1608.08710); new inputs have no effect at first, as in InstructPix2Pix (2211.09800, §3.2).

    Raises ``ValueError`` if the two do not fit together."""
    wide_channels, narrow_channels = (
        wide.config.block_out_channels,
        narrow.config.block_out_channels,
    )
    groups = wide.config.norm_num_groups
    if (
        tuple(wide_channels[:-1]) != tuple(narrow_channels[:-1])
        or narrow_channels[-1] > wide_channels[-1]
        or narrow_channels[-1] % groups
    ):
        raise ValueError(
            f"only the deepest level can shrink, to a multiple of {groups}: {wide_channels} to {narrow_channels} asked for"
        )
    wide_state, narrow_state = wide.state_dict(), {}
    kept_channels = _select_channels(wide, narrow_channels[-1], groups)
    for name, reference in narrow.state_dict().items():
        value = wide_state[name].float()
        for axis in range(min(2, value.ndim)):
            if name == "conv_in.weight" and axis == 1:
                num_new_inputs = reference.shape[1] - value.shape[1]
                value = torch.cat(
                    [value, value.new_zeros(len(value), num_new_inputs, *value.shape[2:])], 1
                )
            elif value.shape[axis] != reference.shape[axis]:
                value = value.index_select(
                    axis,
                    _select_axis_indices(
                        value.shape[axis], reference.shape[axis], wide_channels[-1], kept_channels
                    ),
                )
        if value.shape != reference.shape:
            raise ValueError(
                f"{name} is {list(wide_state[name].shape)} and cannot become {list(reference.shape)}"
            )
        narrow_state[name] = value
    narrow.load_state_dict(narrow_state)


def _select_channels(unet: UNet, num_channels: int, groups: int) -> Tensor:
    """The ``num_channels`` channels of the deepest level, equally many of each group, that residual blocks write to most."""
    blocks = [*unet.down_blocks[-1].resnets, *unet.mid_block.resnets, *unet.up_blocks[0].resnets]
    norms = (
        torch.stack([b.conv2.weight.flatten(1).norm(dim=1) for b in blocks])
        .mean(0)
        .view(groups, -1)
    )
    top_channels = norms.topk(num_channels // groups, 1).indices.sort(1).values
    return (top_channels + torch.arange(groups)[:, None] * norms.shape[1]).flatten()


def _select_axis_indices(
    old_size: int, new_size: int, deepest_width: int, kept_channels: Tensor
) -> Tensor:
    """Indices into an axis of ``old`` numbers: of whole deepest levels, which come first in every concatenation, the
    ``kept_channels`` channels; of what follows, all."""
    num_levels = (old_size - new_size) // (deepest_width - len(kept_channels))
    level_indices = [kept_channels + i * deepest_width for i in range(num_levels)]
    return torch.cat([*level_indices, torch.arange(num_levels * deepest_width, old_size)])


@torch.no_grad()
def widen_unet(narrow: UNet, wide: UNet, noise_std: float = 0.05) -> None:
    """Set the weights of ``wide``, which differs from ``narrow`` in ``block_out_channels[0]`` alone, a whole multiple
    (and in ``time_embedding_dim``, which is then given). ``noise_std``, in standard deviations of each weight, makes the
    copies learn apart. Raises ``ValueError`` if the two do not fit together."""
    width, new_width = narrow.config.block_out_channels[0], wide.config.block_out_channels[0]
    if tuple(narrow.config.block_out_channels[1:]) != tuple(wide.config.block_out_channels[1:]):
        raise ValueError(
            "only the first level can grow: the other levels must be as wide as before"
        )
    if new_width % width:
        raise ValueError(
            f"the first level can grow from {width} to a multiple of it, not to {new_width}"
        )
    groups = narrow.config.norm_num_groups
    old_state, new_state = narrow.state_dict(), {}
    if old_state.keys() != wide.state_dict().keys():
        raise ValueError(
            "the two have other layers: a level as wide as its neighbour has no shortcut to keep"
        )
    for name, reference in wide.state_dict().items():
        value = old_state[name].float()
        if name == "time_embedding.linear_1.weight":
            new_state[name] = _pad_frequencies(value, new_width // width)
            continue
        channel_maps = [
            _make_channel_map(old, new, width, new_width, groups)
            for old, new in zip(value.shape[:2], reference.shape[:2], strict=True)
        ]
        new_value = value[channel_maps[0]]
        if len(channel_maps) > 1:
            num_copies = channel_maps[1].bincount()[channel_maps[1]]
            new_value = new_value[:, channel_maps[1]] / num_copies.view(-1, *[1] * (value.ndim - 2))
            if len(reference) != len(value):
                new_value = new_value + noise_std * new_value.std() * torch.randn_like(new_value)
        if new_value.shape != reference.shape:
            raise ValueError(
                f"{name} is {list(value.shape)} and cannot become {list(reference.shape)}"
            )
        new_state[name] = new_value
    wide.load_state_dict(new_state)


def _make_channel_map(
    old_channels: int, new_channels: int, width: int, new_width: int, groups: int
) -> Tensor:
    """Which old channel each new one copies. Of a concatenation, the last parts are those of the first level."""
    num_parts = (new_channels - old_channels) // (new_width - width) if new_width != width else 0
    group_indices = (
        torch.arange(width).view(groups, 1, -1).expand(-1, new_width // width, -1).flatten()
    )
    num_unchanged = old_channels - num_parts * width
    return torch.cat(
        [
            torch.arange(num_unchanged),
            *(num_unchanged + i * width + group_indices for i in range(num_parts)),
        ]
    )


def _pad_frequencies(weight: Tensor, factor: int) -> Tensor:
    """[out, cos and sin of n frequencies] to one that reads the same among ``factor`` as many frequencies."""
    expanded = weight.new_zeros(len(weight), 2, weight.shape[1] // 2, factor)
    expanded[..., 0] = weight.unflatten(1, (2, -1))
    return expanded.flatten(1)
