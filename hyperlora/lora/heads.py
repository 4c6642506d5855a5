"""Compact ways to write a LoRA, which always expand to ordinary ``LoraWeights``.

LiDB (2307.06949, eq. 2):  ΔW = (A_aux A_train)(B_train B_aux)   A_aux, B_aux fixed, random, orthogonal, from a seed
learned basis (2503.16944, eq. 3):  down = D_0 + Σ c_i D_i,  up = Σ c'_i U_i    D, U learned with the hypernetwork
softmax basis (LoRWeB, 2602.15727):  down = Σ softmax(c)_i D_i,  up = Σ softmax(c')_i U_i
full:  the factors themselves, one linear layer for each (2411.19156)

All are modules whose ``forward`` takes one code per factor and site, [*batch, sites, code_size], and whose zero ``up``
code gives ΔW = 0 (of the softmax basis: at initialisation).
"""

from typing import Any, Final

import torch
from torch import Tensor, nn

from hyperlora.errors import BadRequest
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights


class LiDB(nn.Module):
    """Lightweight DreamBooth: at rank r, r·a numbers for up and r·b for down at every site (paper: r=1, a=100, b=50).

    The auxiliary matrices are rebuilt from ``seed`` and never stored. ``a`` and ``b`` shrink where a site is narrower;
    codes are padded to the wider of the two, so that one width serves all sites.
    """

    def __init__(self, layout: LoraLayout, a: int = 100, b: int = 50, seed: int = 0) -> None:
        super().__init__()
        self.layout, self.a, self.b, self.seed = layout, a, b, seed
        self.code_size = layout.rank * max(a, b)
        generator = torch.Generator().manual_seed(seed)
        for i, site in enumerate(layout.sites):
            self.register_buffer(f"a{i}", _orthogonal(site.fan_out, a, generator), persistent=False)
            self.register_buffer(f"b{i}", _orthogonal(site.fan_in, b, generator).mT, persistent=False)

    def start(self) -> Tensor:
        """Codes [2 * sites, code_size] of ΔW = 0 from which gradients flow: random ``down`` (from the seed, so that all
        who start here start alike), then zero ``up``."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        down = torch.randn(len(self.layout.sites), self.code_size, generator=generator) * self.b**-0.5
        return torch.cat([down, torch.zeros_like(down)])

    def forward(self, down: Tensor, up: Tensor) -> LoraWeights:
        """``down``, ``up`` [*batch, sites, code_size]."""
        rank, downs, ups = self.layout.rank, [], []
        for i in range(len(self.layout.sites)):
            a, b = self.get_buffer(f"a{i}"), self.get_buffer(f"b{i}")
            downs.append(down[..., i, : rank * len(b)].unflatten(-1, (rank, len(b))) @ b)
            ups.append(a @ up[..., i, : rank * a.shape[1]].unflatten(-1, (a.shape[1], rank)))
        return LoraWeights(self.layout, tuple(downs), tuple(ups))


class LearnedBasis(nn.Module):
    """``size`` learned directions per factor and site, mixed by as many coefficients.

    ``down`` has a constant term of ordinary LoRA initialisation, so that a zero code is an ordinary untrained LoRA.
    With ``per_rank`` each of a direction's ``rank`` vectors has a coefficient of its own: the factors fill a space of
    ``rank`` times as many dimensions, for no more directions to learn and to keep.
    """

    def __init__(self, layout: LoraLayout, size: int = 48, per_rank: bool = False) -> None:
        super().__init__()
        rank = layout.rank
        self.layout, self.size, self.per_rank = layout, size, per_rank
        self.code_size = size * rank if per_rank else size
        self.constant = nn.ParameterList(torch.randn(rank, s.fan_in) * s.fan_in**-0.5 for s in layout.sites)
        self.down = nn.ParameterList(torch.randn(size, rank * s.fan_in) * s.fan_in**-0.5 for s in layout.sites)
        self.up = nn.ParameterList(torch.randn(size, s.fan_out * rank) * (size * rank) ** -0.5 for s in layout.sites)

    def start(self) -> Tensor:
        """Codes [2 * sites, size]: small random ``down`` coefficients, zero ``up`` ones."""
        down = torch.randn(len(self.layout.sites), self.code_size) * 0.1 * self.size**-0.5
        return torch.cat([down, torch.zeros_like(down)])

    def forward(self, down: Tensor, up: Tensor) -> LoraWeights:
        """``down``, ``up`` [*batch, sites, code_size]."""
        rank, downs, ups = self.layout.rank, [], []
        for i, site in enumerate(self.layout.sites):
            one, other = self.down[i].unflatten(-1, (rank, site.fan_in)), self.up[i].unflatten(-1, (site.fan_out, rank))
            # [*batch, size, rank], or 1 instead of rank where a direction is taken as a whole
            a, b = (code[..., i, :].unflatten(-1, (self.size, -1)) for code in (down, up))
            downs.append(torch.einsum("...sr,sri->...ri", a, one) + self.constant[i])
            ups.append(torch.einsum("...sr,sor->...or", b, other))
        return LoraWeights(self.layout, tuple(downs), tuple(ups))


class SoftmaxBasis(LearnedBasis):
    """A mix of ``size`` learned LoRAs whose shares are positive and add up to 1."""

    def __init__(self, layout: LoraLayout, size: int = 32) -> None:
        super().__init__(layout, size)
        for up in self.up:
            nn.init.zeros_(up)

    def start(self) -> Tensor:
        """Codes [2 * sites, size]: equal shares."""
        return torch.zeros(2 * len(self.layout.sites), self.code_size)

    def forward(self, down: Tensor, up: Tensor) -> LoraWeights:
        """``down``, ``up`` [*batch, sites, size], before the softmax."""
        return super().forward(down.softmax(-1), up.softmax(-1))


class Full(nn.Module):
    """The factors themselves, padded to the widest site's: nothing is shared between sites."""

    def __init__(self, layout: LoraLayout) -> None:
        super().__init__()
        self.layout = layout
        self.code_size = layout.rank * max(max(s.fan_in, s.fan_out) for s in layout.sites)

    def start(self) -> Tensor:
        """Codes [2 * sites, code_size]: ordinary LoRA initialisation."""
        down = torch.stack([torch.randn(self.code_size) * s.fan_in**-0.5 for s in self.layout.sites])
        return torch.cat([down, torch.zeros_like(down)])

    def forward(self, down: Tensor, up: Tensor) -> LoraWeights:
        """``down``, ``up`` [*batch, sites, code_size]."""
        rank, downs, ups = self.layout.rank, [], []
        for i, site in enumerate(self.layout.sites):
            downs.append(down[..., i, : rank * site.fan_in].unflatten(-1, (rank, site.fan_in)))
            ups.append(up[..., i, : site.fan_out * rank].unflatten(-1, (site.fan_out, rank)))
        return LoraWeights(self.layout, tuple(downs), tuple(ups))


_KINDS: Final = {"lidb": LiDB, "basis": LearnedBasis, "softmax": SoftmaxBasis, "full": Full}


def parametrisation(kind: str, layout: LoraLayout, **options: Any) -> "LiDB | LearnedBasis | Full":
    """One of ``_KINDS`` by name, as configs do. Raises ``BadRequest`` for another."""
    if kind not in _KINDS:
        raise BadRequest(f"unknown parametrisation {kind!r}; known: {', '.join(_KINDS)}")
    made: LiDB | LearnedBasis | Full = _KINDS[kind](layout, **options)
    return made


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[rows, min(rows, columns)] with orthonormal columns."""
    return torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=generator))[0]
