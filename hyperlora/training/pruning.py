"""Start a UNet from a trained one that is wider at its deepest level and reads fewer input channels."""

import torch
from diffusers import UNet2DConditionModel as UNet
from torch import Tensor


@torch.no_grad()
def prune(wide: UNet, narrow: UNet) -> None:
    """Set the weights of ``narrow``, which differs from ``wide`` in ``block_out_channels[-1]``, smaller, and in
    ``in_channels``, larger. At the deepest level those channels of every normalisation group stay that are written to
    most (structured pruning, 1608.08710); new inputs have no effect at first, as in InstructPix2Pix (2211.09800, §3.2).

    Raises ``ValueError`` if the two do not fit together."""
    before, after = wide.config.block_out_channels, narrow.config.block_out_channels
    groups = wide.config.norm_num_groups
    if tuple(before[:-1]) != tuple(after[:-1]) or after[-1] > before[-1] or after[-1] % groups:
        raise ValueError(f"only the deepest level can shrink, to a multiple of {groups}: {before} to {after} asked for")
    old, state = wide.state_dict(), {}
    kept = _most_written(wide, after[-1], groups)
    for name, like in narrow.state_dict().items():
        value = old[name].float()
        for axis in range(min(2, value.ndim)):
            if name == "conv_in.weight" and axis == 1:
                more = like.shape[1] - value.shape[1]
                value = torch.cat([value, value.new_zeros(len(value), more, *value.shape[2:])], 1)
            elif value.shape[axis] != like.shape[axis]:
                value = value.index_select(axis, _kept(value.shape[axis], like.shape[axis], before[-1], kept))
        if value.shape != like.shape:
            raise ValueError(f"{name} is {list(old[name].shape)} and cannot become {list(like.shape)}")
        state[name] = value
    narrow.load_state_dict(state)


def _most_written(unet: UNet, width: int, groups: int) -> Tensor:
    """The ``width`` channels of the deepest level, equally many of each group, that residual blocks write to most."""
    blocks = [*unet.down_blocks[-1].resnets, *unet.mid_block.resnets, *unet.up_blocks[0].resnets]
    norms = torch.stack([b.conv2.weight.flatten(1).norm(dim=1) for b in blocks]).mean(0).view(groups, -1)
    best = norms.topk(width // groups, 1).indices.sort(1).values
    return (best + torch.arange(groups)[:, None] * norms.shape[1]).flatten()


def _kept(old: int, new: int, deepest: int, kept: Tensor) -> Tensor:
    """Indices into an axis of ``old`` numbers: of whole deepest levels, which come first in every concatenation, the
    ``kept`` channels; of what follows, all."""
    times = (old - new) // (deepest - len(kept))
    parts = [kept + i * deepest for i in range(times)]
    return torch.cat([*parts, torch.arange(times * deepest, old)])
