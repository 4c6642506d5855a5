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


@torch.no_grad()
def widen(narrow: UNet, wide: UNet, noise: float = 0.05) -> None:
    """Set the weights of ``wide``, which differs from ``narrow`` in ``block_out_channels[0]`` alone, a whole multiple
    (and in ``time_embedding_dim``, which is then given). ``noise``, in standard deviations of each weight, makes the
    copies learn apart. Raises ``ValueError`` if the two do not fit together."""
    width, wider = narrow.config.block_out_channels[0], wide.config.block_out_channels[0]
    if tuple(narrow.config.block_out_channels[1:]) != tuple(wide.config.block_out_channels[1:]):
        raise ValueError("only the first level can grow: the other levels must be as wide as before")
    if wider % width:
        raise ValueError(f"the first level can grow from {width} to a multiple of it, not to {wider}")
    groups = narrow.config.norm_num_groups
    before, after = narrow.state_dict(), {}
    if before.keys() != wide.state_dict().keys():
        raise ValueError("the two have other layers: a level as wide as its neighbour has no shortcut to keep")
    for name, like in wide.state_dict().items():
        value = before[name].float()
        if name == "time_embedding.linear_1.weight":
            after[name] = _more_frequencies(value, wider // width)
            continue
        maps = [
            _copied(old, new, width, wider, groups) for old, new in zip(value.shape[:2], like.shape[:2], strict=True)
        ]
        made = value[maps[0]]
        if len(maps) > 1:
            times = maps[1].bincount()[maps[1]]
            made = made[:, maps[1]] / times.view(-1, *[1] * (value.ndim - 2))
            if len(like) != len(value):
                made = made + noise * made.std() * torch.randn_like(made)
        if made.shape != like.shape:
            raise ValueError(f"{name} is {list(value.shape)} and cannot become {list(like.shape)}")
        after[name] = made
    wide.load_state_dict(after)


def _copied(old: int, new: int, width: int, wider: int, groups: int) -> Tensor:
    """Which old channel each new one copies. Of a concatenation, the last parts are those of the first level."""
    parts = (new - old) // (wider - width) if wider != width else 0
    grouped = torch.arange(width).view(groups, 1, -1).expand(-1, wider // width, -1).flatten()
    kept = old - parts * width
    return torch.cat([torch.arange(kept), *(kept + i * width + grouped for i in range(parts))])


def _more_frequencies(weight: Tensor, times: int) -> Tensor:
    """[out, cos and sin of n frequencies] to one that reads the same among ``times`` as many frequencies."""
    out = weight.new_zeros(len(weight), 2, weight.shape[1] // 2, times)
    out[..., 0] = weight.unflatten(1, (2, -1))
    return out.flatten(1)
