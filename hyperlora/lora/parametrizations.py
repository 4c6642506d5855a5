"""Spaces in which a LoRA is fitted: codes [*batch, size] that expand to ordinary ``LoraWeights``, K at once.

lora (LoCon where sites are convolutions)   up @ down
lidb (2307.06949, eq. 2)     (A_aux A_train)(B_train B_aux)          see ``LiDB``
loha (2108.06098, eq. 3)     (a1 b1) ∘ (a2 b2)                       Hadamard product, of rank up to inner²
lokr (2212.10650; DiffuseKronA, 2402.17412)   w1 ⊗ (a2 b2)           Kronecker product

The last two are exact as plain LoRAs of a larger rank, so that ``inject_lora`` needs no ΔW:

(a1 b1) ∘ (a2 b2) = Σ_ij (a1_i ∘ a2_j)(b1_i ∘ b2_j)       w1 ⊗ (a2 b2) = (w1 ⊗ a2)(I ⊗ b2) = (I ⊗ a2)(w1 ⊗ b2)

``LoraWeights.resize`` then gives the best LoRA of any rank, as PEFT's ``convert_to_lora`` does from ΔW.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.heads import LiDB
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights


@dataclass(frozen=True)
class LoraParametrization:
    """The factors themselves; codes are ``LoraWeights.flatten``."""

    layout: LoraLayout

    def init_codes(self, generator: Generator) -> Tensor:
        """Codes [size] of an untrained LoRA: random ``down``, zero ``up``."""
        rank, parts = self.layout.rank, []
        for target in self.layout.targets:
            down = (
                torch.randn(rank * target.in_features, generator=generator)
                * target.in_features**-0.5
            )
            parts += [down, torch.zeros(target.out_features * rank)]
        return torch.cat(parts)

    def __call__(self, codes: Tensor) -> LoraWeights:
        return LoraWeights.unflatten(self.layout, codes)


@dataclass(frozen=True)
class LidbParametrization:
    """LiDB with its auxiliary matrices rebuilt from ``lidb.seed``."""

    lidb: LiDB

    @property
    def layout(self) -> LoraLayout:
        return self.lidb.layout

    def init_codes(self, generator: Generator) -> Tensor:
        """Codes [size] of ΔW = 0: random ``down``, zero ``up``."""
        down = (
            torch.randn(len(self.layout.targets) * self.lidb.code_size, generator=generator)
            * self.lidb.b**-0.5
        )
        return torch.cat([down, torch.zeros_like(down)])

    def __call__(self, codes: Tensor) -> LoraWeights:
        down, up = codes.unflatten(-1, (2, len(self.layout.targets), self.lidb.code_size)).unbind(
            -3
        )
        return self.lidb(down, up)


@dataclass(frozen=True)
class LohaParametrization:
    """LoHa of rank ``inner_rank``: per site a1, a2 [fan_out, inner] and b1, b2 [inner, fan_in] (PEFT's hada_w1_a, ...)."""

    target_layout: LoraLayout
    inner_rank: int

    @property
    def layout(self) -> LoraLayout:
        return self.target_layout.with_rank(self.inner_rank**2)

    def get_factor_shapes(self, target: TargetModule) -> tuple[tuple[int, int], ...]:
        """Of a1, b1, a2, b2."""
        return ((target.out_features, self.inner_rank), (self.inner_rank, target.in_features)) * 2

    def init_codes(self, generator: Generator) -> Tensor:
        """Codes [size] of ΔW = 0, initialised as PEFT does: b2 zero, the others He-uniform."""
        return _init_kaiming_codes(self.target_layout, self.get_factor_shapes, 3, generator)

    def __call__(self, codes: Tensor) -> LoraWeights:
        down, up = [], []
        for a1, b1, a2, b2 in _split_codes(
            codes, [self.get_factor_shapes(target) for target in self.target_layout.targets]
        ):
            up.append((a1[..., :, None] * a2[..., None, :]).flatten(-2))
            down.append((b1[..., :, None, :] * b2[..., None, :, :]).flatten(-3, -2))
        return LoraWeights(self.layout, tuple(down), tuple(up))


@dataclass(frozen=True)
class LokrParametrization:
    """LoKr: per site w1 [l, m], a2 [fan_out / l, inner] and b2 [inner, fan_in / m] (PEFT's lokr_w1, lokr_w2_a,
    lokr_w2_b); l and m are what PEFT's ``factorization`` makes of ``factor`` and the channels."""

    target_layout: LoraLayout
    inner_rank: int
    factor: int = 4

    @property
    def layout(self) -> LoraLayout:
        ranks = (
            min(w1) * self.inner_rank
            for w1, _, _ in map(self.get_factor_shapes, self.target_layout.targets)
        )
        return self.target_layout.with_rank(max(ranks))

    def get_factor_shapes(self, target: TargetModule) -> tuple[tuple[int, int], ...]:
        """Of w1, a2, b2."""
        from peft.tuners.lokr.layer import factorization

        m, _ = factorization(target.in_features // prod(target.kernel_size or (1,)), self.factor)
        n, _ = factorization(target.out_features, self.factor)
        return (
            (n, m),
            (target.out_features // n, self.inner_rank),
            (self.inner_rank, target.in_features // m),
        )

    def init_codes(self, generator: Generator) -> Tensor:
        """Codes [size] of ΔW = 0, initialised as PEFT does: w1 zero, the others He-uniform."""
        return _init_kaiming_codes(self.target_layout, self.get_factor_shapes, 0, generator)

    def __call__(self, codes: Tensor) -> LoraWeights:
        down, up, layout = [], [], self.layout
        for w1, a2, b2 in _split_codes(
            codes, [self.get_factor_shapes(target) for target in self.target_layout.targets]
        ):
            n, m = w1.shape[-2:]
            if m <= n:
                left, right = _compute_kron(w1, a2), _compute_kron(torch.eye(m).to(w1), b2)
            else:
                left, right = _compute_kron(torch.eye(n).to(w1), a2), _compute_kron(w1, b2)
            num_pad = layout.rank - left.shape[-1]
            up.append(F.pad(left, (0, num_pad)))
            down.append(
                F.pad(right.expand(*left.shape[:-2], *right.shape[-2:]), (0, 0, 0, num_pad))
            )
        return LoraWeights(layout, tuple(down), tuple(up))


Parametrization = (
    LoraParametrization | LidbParametrization | LohaParametrization | LokrParametrization
)
PARAMETRIZATIONS: Final = ("lora", "lidb", "loha", "lokr")


def make_parametrization(
    kind: str, layout: LoraLayout, inner_rank: int | None = None, a: int = 100, b: int = 50
) -> Parametrization:
    """One of ``PARAMETRIZATIONS`` over the sites of ``layout``. ``inner_rank`` is the rank inside LoHa and LoKr; unless given, it is
    the largest that a LoRA of the layout's rank can hold without loss (LoKr: at a factor of 4). ``a`` and ``b`` are
    LiDB's. Raises ``InvalidArgumentError`` for another kind."""
    match kind:
        case "lora":
            return LoraParametrization(layout)
        case "lidb":
            return LidbParametrization(LiDB(layout, a, b))
        case "loha":
            return LohaParametrization(layout, inner_rank or max(1, int(layout.rank**0.5)))
        case "lokr":
            return LokrParametrization(layout, inner_rank or max(1, layout.rank // 4))
    raise InvalidArgumentError(f"unknown space {kind!r}; known: {', '.join(PARAMETRIZATIONS)}")


def _init_kaiming_codes(
    layout: LoraLayout,
    shapes_fn: Callable[[TargetModule], tuple[tuple[int, int], ...]],
    zero_index: int,
    generator: Generator,
) -> Tensor:
    """``kaiming_uniform_(a=√5)``, which is uniform in ± 1 / √columns, and zeros for the matrix in place ``zero_index``."""
    codes = []
    for target in layout.targets:
        for index, shape in enumerate(shapes_fn(target)):
            bound = 0.0 if index == zero_index else shape[1] ** -0.5
            codes.append((torch.rand(shape, generator=generator).flatten() * 2 - 1) * bound)
    return torch.cat(codes)


def _split_codes(
    codes: Tensor, shapes: Sequence[tuple[tuple[int, int], ...]]
) -> list[list[Tensor]]:
    sizes = [a * b for group in shapes for a, b in group]
    pieces = iter(codes.split(sizes, -1))
    return [[next(pieces).unflatten(-1, shape) for shape in group] for group in shapes]


def _compute_kron(left: Tensor, right: Tensor) -> Tensor:
    """left [*batch, a, b] ⊗ right [*batch, c, d] = [*batch, a c, b d]."""
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2, -1)
