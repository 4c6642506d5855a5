"""``Pointing``: a colour is not remembered but pointed at: where in the picture it is seen, and what is seen there."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

_WIDTH: Final = 16
"""Of the attention; a place is told from others by where it is, what colour it has and how that changed."""


class Pointing(nn.Module):
    """One look at a small picture for each of several things to be said of it: attention over its pixels, and what is
    read from the colour found there, ``numbers[i]`` numbers of look i, linear in it; 0 at initialisation.

    The small picture is what a ``VisionEncoder`` with ``colours`` puts beside its tokens: ``across``² pixels at each of
    ``places``.
    """

    def __init__(self, hidden: int, places: int, across: int, numbers: Sequence[int]) -> None:
        super().__init__()
        self.looks = len(numbers)
        self.ask = nn.Linear(hidden, self.looks * _WIDTH)
        self.where = nn.Parameter(0.02 * torch.randn(places * across**2, _WIDTH))
        self.colour = nn.Linear(6, _WIDTH, bias=False)
        self.read = nn.ParameterList(torch.zeros(3, n) for n in numbers)

    def forward(self, hidden: Tensor, before: Tensor, after: Tensor) -> list[Tensor]:
        """``hidden`` [batch, hidden], ``before`` and ``after`` [batch, views, places, 3 * across²]: [batch, numbers] of
        each look, the mean over views."""
        old, new = _pixels(before), _pixels(after)
        keys = self.where + self.colour(torch.cat([new, new - old], -1))  # [batch, views, pixels, width]
        asked = self.ask(hidden).unflatten(-1, (self.looks, -1))
        shares = torch.einsum("blw,bvpw->bvlp", asked, keys).softmax(-1)
        found = torch.einsum("bvlp,bvpc->blc", shares, new) / new.shape[1]
        return [found[:, i] @ read for i, read in enumerate(self.read)]


def _pixels(tokens: Tensor) -> Tensor:
    """[batch, views, places * across², 3] of what lies beside tokens."""
    return tokens.unflatten(-1, (3, -1)).mT.flatten(2, 3)
