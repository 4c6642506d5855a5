"""Widen the first level of a trained UNet without changing what it computes (Net2Net, 1511.05641, §2.2).

Channels are doubled (tripled, ...) within their normalisation group, and what reads them gets half (a third, ...) of
each copy. Two places cannot be kept exactly: norms over hidden channels and a wider skip, whose groups shift.
"""

import torch
from diffusers import UNet2DConditionModel as UNet
from torch import Tensor


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
