"""Compact ways to write a LoRA, which always expand to ordinary ``LoraWeights``.

LiDB (2307.06949, eq. 2):  ΔW = (A_aux A_train)(B_train B_aux)   A_aux, B_aux fixed, random, orthogonal, from a seed
learned basis (2503.16944, eq. 3):  down = D_0 + Σ c_i D_i,  up = Σ c'_i U_i    D, U learned with the hypernetwork
softmax basis (LoRWeB, 2602.15727):  down = Σ softmax(c)_i D_i,  up = Σ softmax(c')_i U_i
full:  the factors themselves, one linear layer for each (2411.19156)

All are modules whose ``forward`` takes one code per factor and site, [*batch, sites, code_size], and whose zero ``up_basis``
code gives ΔW = 0 (of the softmax basis: at initialisation).
"""

from typing import Any, Final

import torch
from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError
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
        for i, target in enumerate(layout.targets):
            self.register_buffer(
                f"a{i}",
                _make_orthogonal_matrix(target.out_features, a, generator),
                persistent=False,
            )
            self.register_buffer(
                f"b{i}",
                _make_orthogonal_matrix(target.in_features, b, generator).mT,
                persistent=False,
            )

    def init_codes(self) -> Tensor:
        """Codes [2 * sites, code_size] of ΔW = 0 from which gradients flow: random ``down_basis`` (from the seed, so that all
        who start here start alike), then zero ``up_basis``."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        down = (
            torch.randn(len(self.layout.targets), self.code_size, generator=generator)
            * self.b**-0.5
        )
        return torch.cat([down, torch.zeros_like(down)])

    def forward(self, down: Tensor, up: Tensor) -> LoraWeights:
        """``down_basis``, ``up_basis`` [*batch, sites, code_size]."""
        rank, downs, ups = self.layout.rank, [], []
        for i in range(len(self.layout.targets)):
            a, b = self.get_buffer(f"a{i}"), self.get_buffer(f"b{i}")
            downs.append(down[..., i, : rank * len(b)].unflatten(-1, (rank, len(b))) @ b)
            ups.append(a @ up[..., i, : rank * a.shape[1]].unflatten(-1, (a.shape[1], rank)))
        return LoraWeights(self.layout, tuple(downs), tuple(ups))


class LowRankBasisHead(nn.Module):
    """``size`` learned directions per factor and site, mixed by as many coefficients.

    ``down_basis`` has a constant term of ordinary LoRA initialisation, so that a zero code is an ordinary untrained LoRA.
    With ``coefficients_per_rank`` each of a direction's ``rank`` vectors has a coefficient of its own: the factors fill a space of
    ``rank`` times as many dimensions, for no more directions to learn and to keep.
    """

    def __init__(
        self, layout: LoraLayout, size: int = 48, coefficients_per_rank: bool = False
    ) -> None:
        super().__init__()
        rank = layout.rank
        self.layout, self.size, self.coefficients_per_rank = layout, size, coefficients_per_rank
        self.code_size = size * rank if coefficients_per_rank else size
        self.down_bias = nn.ParameterList(
            torch.randn(rank, target.in_features) * target.in_features**-0.5
            for target in layout.targets
        )
        self.down_basis = nn.ParameterList(
            torch.randn(size, rank * target.in_features) * target.in_features**-0.5
            for target in layout.targets
        )
        self.up_basis = nn.ParameterList(
            torch.randn(size, target.out_features * rank) * (size * rank) ** -0.5
            for target in layout.targets
        )

    def init_codes(self) -> Tensor:
        """Codes [2 * sites, size]: small random ``down_basis`` coefficients, zero ``up_basis`` ones."""
        down = torch.randn(len(self.layout.targets), self.code_size) * 0.1 * self.size**-0.5
        return torch.cat([down, torch.zeros_like(down)])

    def forward(self, down: Tensor, up: Tensor) -> LoraWeights:
        """``down_basis``, ``up_basis`` [*batch, sites, code_size]."""
        rank, downs, ups = self.layout.rank, [], []
        for i, target in enumerate(self.layout.targets):
            down_basis, up_basis = (
                self.down_basis[i].unflatten(-1, (rank, target.in_features)),
                self.up_basis[i].unflatten(-1, (target.out_features, rank)),
            )
            # [*batch, size, rank], or 1 instead of rank where a direction is taken as a whole
            down_coefficients, up_coefficients = (
                code[..., i, :].unflatten(-1, (self.size, -1)) for code in (down, up)
            )
            downs.append(
                torch.einsum("...sr,sri->...ri", down_coefficients, down_basis) + self.down_bias[i]
            )
            ups.append(torch.einsum("...sr,sor->...or", up_coefficients, up_basis))
        return LoraWeights(self.layout, tuple(downs), tuple(ups))


class SoftmaxBasisHead(LowRankBasisHead):
    """A mix of ``size`` learned LoRAs whose shares are positive and add up to 1."""

    def __init__(self, layout: LoraLayout, size: int = 32) -> None:
        super().__init__(layout, size)
        for up_basis in self.up_basis:
            nn.init.zeros_(up_basis)

    def init_codes(self) -> Tensor:
        """Codes [2 * sites, size]: equal shares."""
        return torch.zeros(2 * len(self.layout.targets), self.code_size)

    def forward(self, down: Tensor, up: Tensor) -> LoraWeights:
        """``down_basis``, ``up_basis`` [*batch, sites, size], before the softmax."""
        return super().forward(down.softmax(-1), up.softmax(-1))


class DirectHead(nn.Module):
    """The factors themselves, padded to the widest site's: nothing is shared between sites."""

    def __init__(self, layout: LoraLayout) -> None:
        super().__init__()
        self.layout = layout
        self.code_size = layout.rank * max(
            max(target.in_features, target.out_features) for target in layout.targets
        )

    def init_codes(self) -> Tensor:
        """Codes [2 * sites, code_size]: ordinary LoRA initialisation."""
        down = torch.stack(
            [
                torch.randn(self.code_size) * target.in_features**-0.5
                for target in self.layout.targets
            ]
        )
        return torch.cat([down, torch.zeros_like(down)])

    def forward(self, down: Tensor, up: Tensor) -> LoraWeights:
        """``down_basis``, ``up_basis`` [*batch, sites, code_size]."""
        rank, downs, ups = self.layout.rank, [], []
        for i, target in enumerate(self.layout.targets):
            downs.append(
                down[..., i, : rank * target.in_features].unflatten(-1, (rank, target.in_features))
            )
            ups.append(
                up[..., i, : target.out_features * rank].unflatten(-1, (target.out_features, rank))
            )
        return LoraWeights(self.layout, tuple(downs), tuple(ups))


_HEADS: Final = {
    "lidb": LiDB,
    "basis": LowRankBasisHead,
    "softmax": SoftmaxBasisHead,
    "full": DirectHead,
}


def make_head(
    head_type: str, layout: LoraLayout, **options: Any
) -> "LiDB | LowRankBasisHead | DirectHead":
    """One of ``_HEADS`` by name, as configs do. Raises ``InvalidArgumentError`` for another."""
    if head_type not in _HEADS:
        raise InvalidArgumentError(
            f"unknown parametrisation {head_type!r}; known: {', '.join(_HEADS)}"
        )
    head: LiDB | LowRankBasisHead | DirectHead = _HEADS[head_type](layout, **options)
    return head


def _make_orthogonal_matrix(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[rows, min(rows, columns)] with orthonormal columns."""
    return torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=generator))[0]
