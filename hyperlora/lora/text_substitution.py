"""``WordSites``: words as a LoRA, at the sites of a denoiser that read its text.

e(∅) (W + ΔW)ᵀ = e(words) Wᵀ      ΔW = (W bᵀ) (aᵀ e(∅)⁺ᵀ),   a b ≈ e(words) - e(∅)   [tokens, rank] [rank, width]

The tokens of the empty text are linearly independent, so each can be made to say anything: the LoRA gives it the keys
and values of another word, as exactly as the rank allows. One ``a`` and ``b`` serve all sites: what a LoRA says is a
text, and can be learned from texts alone, without the denoiser.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.errors import BadRequest
from hyperlora.lora.layout import LoraLayout, Site
from hyperlora.lora.weights import LoraWeights

TOLD_APART: Final = 3e-5
"""Directions in which the empty text's tokens differ by less, of the most, are left out: half precision ends there."""


class WordSites(nn.Module):
    """The sites of ``layout`` that read text of ``width`` numbers a token, ``tokens`` tokens, and all that ΔW needs to
    know of the base (``learn``). The other sites may use fewer of the layout's rank, ``rest``: words need more. Words
    may be told in a ``basis`` of fewer directions than ``width``.

    Raises ``BadRequest`` if the layout has no such site, or ``rest`` is more than its rank.
    """

    said: Tensor

    def __init__(
        self, layout: LoraLayout, tokens: int, width: int, rest: int | None = None, basis: int | None = None
    ) -> None:
        super().__init__()
        self.layout, self.tokens, self.width, self.rest = layout, tokens, width, rest or layout.rank
        if self.rest > layout.rank:
            raise BadRequest(f"sites that read no text cannot be of rank {rest}: the whole LoRA is of {layout.rank}")
        self.places = [i for i, site in enumerate(layout.sites) if site.reads_text and site.fan_in == width]
        if not self.places:
            raise BadRequest(f"no site of the layout reads text of width {width}: leave words out")
        self.register_buffer("said", torch.zeros(tokens, width))  # pinv(e(∅)ᵀ)
        for i, site in enumerate(self.sites):
            self.register_buffer(f"weight{i}", torch.zeros(site.fan_out, basis or width))

    @property
    def sites(self) -> list[Site]:
        return [self.layout.sites[i] for i in self.places]

    @property
    def others(self) -> LoraLayout:
        """The layout without these sites, of rank ``rest``."""
        others = (site for i, site in enumerate(self.layout.sites) if i not in self.places)
        return LoraLayout(tuple(others), self.rest, self.layout.base)

    @torch.no_grad()
    def learn(self, empty: Tensor, weights: Sequence[Tensor], basis: Tensor | None = None) -> None:
        """``empty`` [tokens, width], the base's embedding of the empty text; ``weights`` of ``sites``, in order; the
        ``basis`` [directions, width] that words are told in, orthonormal."""
        self.said.copy_(torch.linalg.pinv(empty.double().mT, rtol=TOLD_APART))
        for i, weight in enumerate(weights):
            self.get_buffer(f"weight{i}").copy_(weight if basis is None else weight @ basis.to(weight).mT)

    def forward(self, a: Tensor, b: Tensor, rest: LoraWeights) -> LoraWeights:
        """``a`` [*batch, tokens, rank] and ``b`` [*batch, rank, basis] at these sites, ``rest`` at the others."""
        with torch.autocast(a.device.type, enabled=False):
            said = a.float().mT @ self.said
            spoken = {place: (said, weight @ b.float().mT) for place, weight in self._weights()}
        unused = self.layout.rank - self.rest
        others = ((F.pad(d, (0, 0, 0, unused)), F.pad(u, (0, unused))) for d, u in zip(rest.down, rest.up, strict=True))
        pairs = (spoken.get(i) or next(others) for i in range(len(self.layout.sites)))
        down, up = zip(*pairs, strict=True)
        return LoraWeights(self.layout, down, up)

    def nearest(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The ``a`` and ``b`` of the layout's rank that are nearest to ``wanted`` [*batch, tokens, width] (Eckart and
        Young)."""
        return low_rank(wanted, self.layout.rank)

    def _weights(self) -> Iterator[tuple[int, Tensor]]:
        """Of each site its place in the layout and its weight."""
        return ((place, self.get_buffer(f"weight{i}")) for i, place in enumerate(self.places))


def low_rank(wanted: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[*batch, m, rank] and [*batch, rank, n], whose product is nearest to ``wanted`` [*batch, m, n] (Eckart and
    Young); zeros where there is more rank than to say."""
    left, scale, right = torch.linalg.svd(wanted, full_matrices=False)
    root, unused = scale.sqrt(), rank - scale.shape[-1]  # below 0 the last are left out
    return F.pad(left * root[..., None, :], (0, unused)), F.pad(root[..., None] * right, (0, 0, 0, unused))
