"""Parametrizations: spaces in which an optimizer fits LoRAs, K at once.

Codes [*batch, size] expand to ordinary ``LoraWeights``.

    lora (LoCon for convolutions)   ΔW = up @ down
    lidb (2307.06949, eq. 2)        ΔW = (A_aux A_train)(B_train B_aux)     see ``LiDB``
    loha (2108.06098, eq. 3)        ΔW = (a1 b1) ∘ (a2 b2)                  Hadamard product
    lokr (2212.10650; 2402.17412)   ΔW = w1 ⊗ (a2 b2)                       Kronecker product

The last two are exact as plain LoRAs of a larger rank, so ``inject_lora`` needs no ΔW:

    (a1 b1) ∘ (a2 b2) = Σ_ij (a1_i ∘ a2_j)(b1_i ∘ b2_j)        rank inner_rank²
    w1 ⊗ (a2 b2) = (w1 ⊗ a2)(I ⊗ b2) = (I ⊗ a2)(w1 ⊗ b2)       rank inner_rank · min(w1.shape)

``LoraWeights.resize`` then gives the best LoRA of any rank, as PEFT's ``convert_to_lora`` does.

Shapes in comments: *B is any number of batch axes, r the rank of the LoRAs, q ``inner_rank``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import torch
from torch import Generator, Tensor

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.factors import pad_factors
from hyperlora.lora.heads import LiDB
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights

FactorShapes = tuple[tuple[int, int], ...]
"""Shapes of the matrices that make up one ΔW."""


@dataclass(frozen=True)
class LoraParametrization:
    """The factors of a LoRA themselves; codes are ``LoraWeights.flatten``.

    Attributes:
        layout: The targets and the rank.
    """

    layout: LoraLayout

    def init_codes(self, generator: Generator) -> Tensor:
        """Make the codes of an untrained LoRA: random ``down``, zero ``up``.

        Returns:
            [size].
        """
        rank, pieces = self.layout.rank, []
        for target in self.layout.targets:
            down = torch.randn(rank * target.in_features, generator=generator)  # [r * in]
            # std in^-1/2: each number of down x is a sum over in, and so has the variance of x
            pieces += [down * target.in_features**-0.5, torch.zeros(target.out_features * rank)]
        return torch.cat(pieces)  # [Σ_targets r (in + out)], the order of LoraWeights.flatten

    def __call__(self, codes: Tensor) -> LoraWeights:
        """Split codes [*batch, size] into factors."""
        return LoraWeights.unflatten(self.layout, codes)


@dataclass(frozen=True)
class LidbParametrization:
    """Lightweight DreamBooth: small matrices between fixed auxiliary ones.

    Attributes:
        lidb: The head with the auxiliary matrices, which its seed rebuilds.
    """

    lidb: LiDB

    @property
    def layout(self) -> LoraLayout:
        """Targets and rank of the expanded LoRAs."""
        return self.lidb.layout

    def init_codes(self, generator: Generator) -> Tensor:
        """Make the codes of ΔW = 0: random ``down``, zero ``up``.

        Returns:
            [size].
        """
        size = len(self.layout.targets) * self.lidb.code_size  # of one factor, at all targets
        # std b^-1/2: rows of B_train, and so those of down = B_train B_aux, have norms about 1
        down = torch.randn(size, generator=generator) * self.lidb.b**-0.5
        return torch.cat([down, torch.zeros_like(down)])  # [2 * targets * code_size]

    def __call__(self, codes: Tensor) -> LoraWeights:
        """Expand codes [*batch, size]."""
        shape = (2, len(self.layout.targets), self.lidb.code_size)
        down, up = codes.unflatten(-1, shape).unbind(-3)  # [*B, targets, code_size] each
        return self.lidb(down, up)


@dataclass(frozen=True)
class LohaParametrization:
    """LoHa, the Hadamard product of two low-rank matrices: ΔW = (a1 b1) ∘ (a2 b2).

    Attributes:
        target_layout: The targets; its rank is not used.
        inner_rank: The rank of either matrix.
    """

    target_layout: LoraLayout
    inner_rank: int

    @property
    def layout(self) -> LoraLayout:
        """Targets and rank, inner_rank², of the expanded LoRAs."""
        return self.target_layout.with_rank(self.inner_rank**2)

    def get_factor_shapes(self, target: TargetModule) -> FactorShapes:
        """Return the shapes of a1, b1, a2 and b2 (PEFT: ``hada_w1_a``, …)."""
        a_shape = (target.out_features, self.inner_rank)  # (out, q)
        b_shape = (self.inner_rank, target.in_features)  # (q, in)
        return (a_shape, b_shape, a_shape, b_shape)

    def init_codes(self, generator: Generator) -> Tensor:
        """Make the codes of ΔW = 0, initialized as in PEFT: b2 zero, the others He-uniform.

        Returns:
            [size].
        """
        # 3 is the index of b2
        return _init_kaiming_codes(self.target_layout, self.get_factor_shapes, 3, generator)

    def __call__(self, codes: Tensor) -> LoraWeights:
        """Expand codes [*batch, size] by (a1 b1) ∘ (a2 b2) = Σ_ij (a1_i ∘ a2_j)(b1_i ∘ b2_j)."""
        downs, ups = [], []
        shapes = [self.get_factor_shapes(target) for target in self.target_layout.targets]
        for a1, b1, a2, b2 in _split_codes(codes, shapes):
            # Σ_ij over columns i of a1 and j of a2, and rows i of b1 and j of b2
            up = a1[..., :, None] * a2[..., None, :]  # [*B, out, q, q]
            down = b1[..., :, None, :] * b2[..., None, :, :]  # [*B, q, q, in]
            # both flatten (i, j) to i q + j, so column and row of a pair meet in up @ down
            ups.append(up.flatten(-2))  # [*B, out, q²]
            downs.append(down.flatten(-3, -2))  # [*B, q², in]
        return LoraWeights(self.layout, tuple(downs), tuple(ups))


@dataclass(frozen=True)
class LokrParametrization:
    """LoKr, the Kronecker product of a small and a low-rank matrix: ΔW = w1 ⊗ (a2 b2).

    Attributes:
        target_layout: The targets; its rank is not used.
        inner_rank: The rank of a2 b2.
        factor: PEFT's ``decompose_factor``, from which ``factorization`` computes the shape of w1.
    """

    target_layout: LoraLayout
    inner_rank: int
    factor: int = 4

    @property
    def layout(self) -> LoraLayout:
        """Targets and rank of the expanded LoRAs: the largest rank of any target."""
        ranks = [  # q · min(n, m), by the identity of smaller rank
            min(self.get_factor_shapes(target)[0]) * self.inner_rank
            for target in self.target_layout.targets
        ]
        return self.target_layout.with_rank(max(ranks))

    def get_factor_shapes(self, target: TargetModule) -> FactorShapes:
        """Return the shapes of w1 [n, m], a2 [out / n, inner_rank] and b2 [inner_rank, in / m]."""
        from peft.tuners.lokr.layer import factorization

        # PEFT factorizes the channels of a convolution; the kernel area stays whole, in b2
        in_channels = target.in_features // prod(target.kernel_size or (1,))
        m, _ = factorization(in_channels, self.factor)  # a divisor of in near the factor
        n, _ = factorization(target.out_features, self.factor)  # a divisor of out near the factor
        a2_shape = (target.out_features // n, self.inner_rank)  # (out / n, q)
        b2_shape = (self.inner_rank, target.in_features // m)  # (q, in / m)
        return ((n, m), a2_shape, b2_shape)

    def init_codes(self, generator: Generator) -> Tensor:
        """Make the codes of ΔW = 0, initialized as in PEFT: w1 zero, the others He-uniform.

        Returns:
            [size].
        """
        # 0 is the index of w1
        return _init_kaiming_codes(self.target_layout, self.get_factor_shapes, 0, generator)

    def __call__(self, codes: Tensor) -> LoraWeights:
        """Expand codes [*batch, size] by the identity of smaller rank.

        w1 ⊗ (a2 b2) = (w1 ⊗ a2)(I_m ⊗ b2) has rank m·q, (I_n ⊗ a2)(w1 ⊗ b2) has rank n·q.
        """
        layout, downs, ups = self.layout, [], []
        shapes = [self.get_factor_shapes(target) for target in self.target_layout.targets]
        for w1, a2, b2 in _split_codes(codes, shapes):
            n, m = w1.shape[-2:]
            if m <= n:
                # [*B, n, m] ⊗ [*B, out / n, q] and [m, m] ⊗ [*B, q, in / m]
                up = _compute_kron(w1, a2)  # [*B, out, m q]
                down = _compute_kron(torch.eye(m).to(w1), b2)  # [*B, m q, in]
            else:
                # [n, n] ⊗ [*B, out / n, q] and [*B, n, m] ⊗ [*B, q, in / m]
                up = _compute_kron(torch.eye(n).to(w1), a2)  # [*B, out, n q]
                down = _compute_kron(w1, b2)  # [*B, n q, in]
            down, up = pad_factors(down, up, layout.rank)  # a layout has one rank for all targets
            downs.append(down)  # [*B, r, in]
            ups.append(up)  # [*B, out, r]
        return LoraWeights(layout, tuple(downs), tuple(ups))


Parametrization = (
    LoraParametrization | LidbParametrization | LohaParametrization | LokrParametrization
)
PARAMETRIZATIONS: Final = ("lora", "lidb", "loha", "lokr")


def make_parametrization(
    kind: str, layout: LoraLayout, inner_rank: int | None = None, a: int = 100, b: int = 50
) -> Parametrization:
    """Make a parametrization by its name.

    Args:
        kind: One of ``PARAMETRIZATIONS``.
        layout: The targets and the rank.
        inner_rank: The rank inside LoHa and LoKr. By default the largest whose LoRAs still fit
            into the rank of ``layout`` without loss (LoKr: at a factor of 4), and at least 1.
        a: Columns of LiDB's A_aux.
        b: Rows of LiDB's B_aux.

    Returns:
        The parametrization.

    Raises:
        InvalidArgumentError: The name is unknown.
    """
    match kind:
        case "lora":
            return LoraParametrization(layout)
        case "lidb":
            return LidbParametrization(LiDB(layout, a, b))
        case "loha":
            # rank q² at every target
            return LohaParametrization(layout, inner_rank or max(1, int(layout.rank**0.5)))
        case "lokr":
            # rank q · min(n, m), at most 4 q
            return LokrParametrization(layout, inner_rank or max(1, layout.rank // 4))
    raise InvalidArgumentError(
        f"unknown parametrization {kind!r}; known: {', '.join(PARAMETRIZATIONS)}"
    )


def _init_kaiming_codes(
    layout: LoraLayout,
    shapes_fn: Callable[[TargetModule], FactorShapes],
    zero_index: int,
    generator: Generator,
) -> Tensor:
    """Draw matrices by ``kaiming_uniform_(a=√5)``; the matrix of index ``zero_index`` is zero.

    That initialization is uniform in ± columns^-1/2.
    """
    codes = []
    for target in layout.targets:
        for index, shape in enumerate(shapes_fn(target)):
            # gain √(2 / (1 + 5)) times √(3 / columns)
            bound = 0.0 if index == zero_index else shape[1] ** -0.5
            # drawn for the zero matrix too, so the others do not depend on which one is zero
            uniform = torch.rand(shape, generator=generator).flatten() * 2 - 1  # in [-1, 1]
            codes.append(uniform * bound)  # [rows * columns]
    return torch.cat(codes)


def _split_codes(codes: Tensor, shapes: Sequence[FactorShapes]) -> list[list[Tensor]]:
    """Split codes [*batch, size] into the matrices of every target."""
    sizes = [rows * columns for group in shapes for rows, columns in group]
    pieces = iter(codes.split(sizes, -1))  # [*B, rows * columns] each
    # [*B, rows, columns] each, as many per target as its group has shapes
    return [[next(pieces).unflatten(-1, shape) for shape in group] for group in shapes]


def _compute_kron(left: Tensor, right: Tensor) -> Tensor:
    """left [*batch, a, b] ⊗ right [*batch, c, d] = [*batch, a c, b d]."""
    # (L ⊗ R)[i c + k, j d + l] = L[i, j] R[k, l]
    product = left[..., :, None, :, None] * right[..., None, :, None, :]  # [*B, a, c, b, d]
    return product.flatten(-4, -3).flatten(-2, -1)  # [*B, a c, b, d], then [*B, a c, b d]
