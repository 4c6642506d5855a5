"""Initialize a UNet from one that is wider at its deepest or narrower at its first level."""

import torch
from diffusers import UNet2DConditionModel as UNet
from torch import Tensor


@torch.no_grad()
def prune_unet(wide: UNet, narrow: UNet) -> None:
    """Set the weights of a UNet to those of one that is wider at the deepest level.

    At the deepest level, the channels with the largest output weights are kept, equally many of
    each normalization group (structured pruning, 1608.08710). Additional input channels get zero
    weights and have no effect at first, as in InstructPix2Pix (2211.09800, §3.2).

    Args:
        wide: Trained UNet.
        narrow: UNet to set. It differs from ``wide`` in ``block_out_channels[-1]``, at most as
            large, and in ``in_channels``, at least as large.

    Raises:
        ValueError: If the two differ otherwise.
    """
    wide_widths, narrow_widths = wide.config.block_out_channels, narrow.config.block_out_channels
    num_groups = wide.config.norm_num_groups
    if (
        tuple(wide_widths[:-1]) != tuple(narrow_widths[:-1])
        or narrow_widths[-1] > wide_widths[-1]
        or narrow_widths[-1] % num_groups
    ):
        raise ValueError(
            f"only the deepest level can shrink, to a multiple of {num_groups}: "
            f"{wide_widths} to {narrow_widths} asked for"
        )
    wide_state, narrow_state = wide.state_dict(), {}
    # one choice for the whole level: its blocks add to one residual stream, channel by channel
    kept_channels = _select_channels(wide, narrow_widths[-1], num_groups)  # [num_kept]
    for name, reference in narrow.state_dict().items():
        value = wide_state[name].float()  # [out, in, ...] or [out]
        for axis in range(min(2, value.ndim)):  # out, then in; kernels keep their height and width
            old_size, new_size = value.shape[axis], reference.shape[axis]
            if name == "conv_in.weight" and axis == 1:
                # [out, new_size - old_size, kh, kw], behind the old inputs
                new_inputs = value.new_zeros(len(value), new_size - old_size, *value.shape[2:])
                value = torch.cat([value, new_inputs], 1)
            elif old_size != new_size:
                indices = _select_axis_indices(old_size, new_size, wide_widths[-1], kept_channels)
                value = value.index_select(axis, indices)  # [new_size, ...] or [out, new_size, ...]
        if value.shape != reference.shape:
            raise ValueError(
                f"{name} is {list(wide_state[name].shape)} and cannot become "
                f"{list(reference.shape)}"
            )
        narrow_state[name] = value
    narrow.load_state_dict(narrow_state)


def _select_channels(unet: UNet, num_channels: int, num_groups: int) -> Tensor:
    """Select the deepest level's channels with the largest mean norm of output weights.

    Returns:
        Rising channel indices [num_channels], equally many of each normalization group.
    """
    blocks = [*unet.down_blocks[-1].resnets, *unet.mid_block.resnets, *unet.up_blocks[0].resnets]
    # conv2 [width, width, 3, 3] adds to the residual stream: its rows are the outputs to judge.
    # 1608.08710 ranks them by the L1 norm, this function by the L2 norm.
    block_norms = [block.conv2.weight.flatten(1).norm(dim=1) for block in blocks]  # each [width]
    norms = torch.stack(block_norms).mean(0).view(num_groups, -1)  # [groups, width / groups]
    # equally many of each group, so that GroupNorm still normalizes them together; [groups, kept]
    kept = norms.topk(num_channels // num_groups, 1).indices.sort(1).values  # within each group
    group_starts = torch.arange(num_groups)[:, None] * norms.shape[1]  # [groups, 1]
    return (kept + group_starts).flatten()  # [num_channels], indices into the whole width


def _select_axis_indices(
    old_size: int, new_size: int, deepest_width: int, kept_channels: Tensor
) -> Tensor:
    """Select what is kept of an axis that concatenates channels of several levels.

    The deepest level comes first in every concatenation, perhaps several times. All other channels
    are kept.

    Args:
        old_size: Of the axis.
        new_size: Of the axis.
        deepest_width: Channels of the deepest level.
        kept_channels: Those of the deepest level that are kept, [num_kept].

    Returns:
        Indices into the axis, [new_size].
    """
    # Each repeat loses width - kept channels. Example: GEGLU [8 · width] shrinks by 8 times that.
    num_levels = (old_size - new_size) // (deepest_width - len(kept_channels))
    level_indices = [kept_channels + i * deepest_width for i in range(num_levels)]
    # all channels after the last repeat, those of other levels, stay: [new_size]
    return torch.cat([*level_indices, torch.arange(num_levels * deepest_width, old_size)])


@torch.no_grad()
def widen_unet(narrow: UNet, wide: UNet, noise_std: float = 0.05) -> None:
    """Set the weights of a UNet to those of one that is narrower at the first level.

    Channels are copied, and weights that read a copied channel are divided by the number of its
    copies, so the output stays nearly the same. It is not exact: normalization groups that span
    copied and other channels change.

    Args:
        narrow: Trained UNet.
        wide: UNet to set. It differs from ``narrow`` in ``block_out_channels[0]``, a multiple.
            Its ``time_embedding_dim`` must be given, as that of ``narrow``.
        noise_std: Standard deviation of the noise on matrices and kernels with copied output
            channels, in standard deviations of the weight. It lets the copies diverge in training.

    Raises:
        ValueError: If the two differ otherwise.
    """
    width, new_width = narrow.config.block_out_channels[0], wide.config.block_out_channels[0]
    if tuple(narrow.config.block_out_channels[1:]) != tuple(wide.config.block_out_channels[1:]):
        raise ValueError(
            "only the first level can grow: the other levels must be as wide as before"
        )
    if new_width % width:
        raise ValueError(
            f"the first level can grow from {width} to a multiple of it, not to {new_width}"
        )
    num_groups = narrow.config.norm_num_groups
    old_state, new_state = narrow.state_dict(), {}
    if old_state.keys() != wide.state_dict().keys():
        raise ValueError(
            "the two have other layers: a level as wide as its neighbour has no shortcut to keep"
        )
    for name, reference in wide.state_dict().items():
        value = old_state[name].float()  # [out, in, ...] or [out]
        if name == "time_embedding.linear_1.weight":
            new_state[name] = _pad_frequencies(value, new_width // width)
            continue
        channel_maps = [  # [new_out] and, unless it is a vector, [new_in]: old index by new index
            _make_channel_map(old_size, new_size, width, new_width, num_groups)
            for old_size, new_size in zip(value.shape[:2], reference.shape[:2], strict=True)
        ]
        new_value = value[channel_maps[0]]  # [new_out, in, ...]
        if len(channel_maps) > 1:
            in_map = channel_maps[1]  # [new_in]
            # n equal inputs x times w / n add up to w x; [new_in], or [new_in, 1, 1] for kernels
            num_copies = in_map.bincount()[in_map].view(-1, *[1] * (value.ndim - 2))
            new_value = new_value[:, in_map] / num_copies  # [new_out, new_in, ...]
            # where outputs are copies: equal rows would get equal gradients and stay equal
            if len(reference) != len(value):
                noise = torch.randn_like(new_value)
                new_value = new_value + noise_std * new_value.std() * noise
        if new_value.shape != reference.shape:
            raise ValueError(
                f"{name} is {list(value.shape)} and cannot become {list(reference.shape)}"
            )
        new_state[name] = new_value
    wide.load_state_dict(new_state)


def _make_channel_map(
    old_size: int, new_size: int, width: int, new_width: int, num_groups: int
) -> Tensor:
    """Map each channel of a widened axis to the old channel that it copies.

    The first level comes last in every concatenation, perhaps several times. Its channels are
    copied group by group, so that normalization groups keep their channels.

    Args:
        old_size: Of the axis.
        new_size: Of the axis.
        width: Channels of the first level before.
        new_width: Channels of the first level after.
        num_groups: Normalization groups.

    Returns:
        Old indices, [new_size].
    """
    num_parts = (new_size - old_size) // (new_width - width) if new_width != width else 0
    groups = torch.arange(width).view(num_groups, 1, -1)  # [groups, 1, width / groups]
    level_map = groups.expand(-1, new_width // width, -1).flatten()  # [new_width]
    num_unchanged = old_size - num_parts * width
    part_maps = [num_unchanged + i * width + level_map for i in range(num_parts)]
    return torch.cat([torch.arange(num_unchanged), *part_maps])  # [new_size]


def _pad_frequencies(weight: Tensor, factor: int) -> Tensor:
    """Make a time embedding's weight read the same among ``factor`` times as many frequencies.

    Every ``factor``-th frequency of the wider embedding equals one of the narrower; the others get
    zero weights.

    Args:
        weight: [out, 2 * n], cosines and sines of n frequencies.
        factor: Multiple of n.

    Returns:
        [out, 2 * n * factor].
    """
    # Frequency i of n is 10000^(-i / n) (diffusers with freq_shift=0), so frequency i · factor of
    # n · factor is the same.
    padded = weight.new_zeros(len(weight), 2, weight.shape[1] // 2, factor)  # [out, 2, n, factor]
    padded[..., 0] = weight.unflatten(1, (2, -1))  # [out, 2, n]
    return padded.flatten(1)  # [out, 2 * n * factor]; column i · factor reads frequency i
