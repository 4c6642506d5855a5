"""Spaces in which a LoRA is fitted: codes [*batch, size] that expand to ordinary ``LoraWeights``, K at once.

lora (LoCon where sites are convolutions)   up @ down
lidb (2307.06949, eq. 2)     (A_aux A_train)(B_train B_aux)          see ``LiDB``
loha (2108.06098, eq. 3)     (a1 b1) ∘ (a2 b2)                       Hadamard product, of rank up to inner²
lokr (2212.10650; DiffuseKronA, 2402.17412)   w1 ⊗ (a2 b2)           Kronecker product

The last two are exact as plain LoRAs of a larger rank, so that ``injected`` needs no ΔW:

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

from hyperlora.errors import BadRequest
from hyperlora.lora.heads import LiDB
from hyperlora.lora.layout import LoraLayout, Site
from hyperlora.lora.weights import LoraWeights


@dataclass(frozen=True)
class Plain:
    """The factors themselves; codes are ``LoraWeights.flatten``."""

    layout: LoraLayout

    def start(self, generator: Generator) -> Tensor:
        """Codes [size] of an untrained LoRA: random ``down``, zero ``up``."""
        rank, parts = self.layout.rank, []
        for site in self.layout.sites:
            down = torch.randn(rank * site.fan_in, generator=generator) * site.fan_in**-0.5
            parts += [down, torch.zeros(site.fan_out * rank)]
        return torch.cat(parts)

    def __call__(self, codes: Tensor) -> LoraWeights:
        return LoraWeights.unflatten(self.layout, codes)


@dataclass(frozen=True)
class Lightweight:
    """LiDB with its auxiliary matrices rebuilt from ``lidb.seed``."""

    lidb: LiDB

    @property
    def layout(self) -> LoraLayout:
        return self.lidb.layout

    def start(self, generator: Generator) -> Tensor:
        """Codes [size] of ΔW = 0: random ``down``, zero ``up``."""
        down = torch.randn(len(self.layout.sites) * self.lidb.code_size, generator=generator) * self.lidb.b**-0.5
        return torch.cat([down, torch.zeros_like(down)])

    def __call__(self, codes: Tensor) -> LoraWeights:
        down, up = codes.unflatten(-1, (2, len(self.layout.sites), self.lidb.code_size)).unbind(-3)
        return self.lidb(down, up)


@dataclass(frozen=True)
class Hadamard:
    """LoHa of rank ``inner``: per site a1, a2 [fan_out, inner] and b1, b2 [inner, fan_in] (PEFT's hada_w1_a, ...)."""

    sites: LoraLayout
    inner: int

    @property
    def layout(self) -> LoraLayout:
        return self.sites.with_rank(self.inner**2)

    def shapes(self, site: Site) -> tuple[tuple[int, int], ...]:
        """Of a1, b1, a2, b2."""
        return ((site.fan_out, self.inner), (self.inner, site.fan_in)) * 2

    def start(self, generator: Generator) -> Tensor:
        """Codes [size] of ΔW = 0, initialised as PEFT does: b2 zero, the others He-uniform."""
        return _he_except(self.sites, self.shapes, 3, generator)

    def __call__(self, codes: Tensor) -> LoraWeights:
        down, up = [], []
        for a1, b1, a2, b2 in _parts(codes, [self.shapes(s) for s in self.sites.sites]):
            up.append((a1[..., :, None] * a2[..., None, :]).flatten(-2))
            down.append((b1[..., :, None, :] * b2[..., None, :, :]).flatten(-3, -2))
        return LoraWeights(self.layout, tuple(down), tuple(up))


@dataclass(frozen=True)
class Kronecker:
    """LoKr: per site w1 [l, m], a2 [fan_out / l, inner] and b2 [inner, fan_in / m] (PEFT's lokr_w1, lokr_w2_a,
    lokr_w2_b); l and m are what PEFT's ``factorization`` makes of ``factor`` and the channels."""

    sites: LoraLayout
    inner: int
    factor: int = 4

    @property
    def layout(self) -> LoraLayout:
        ranks = (min(w1) * self.inner for w1, _, _ in map(self.shapes, self.sites.sites))
        return self.sites.with_rank(max(ranks))

    def shapes(self, site: Site) -> tuple[tuple[int, int], ...]:
        """Of w1, a2, b2."""
        from peft.tuners.lokr.layer import factorization

        m, _ = factorization(site.fan_in // prod(site.kernel or (1,)), self.factor)
        n, _ = factorization(site.fan_out, self.factor)
        return (n, m), (site.fan_out // n, self.inner), (self.inner, site.fan_in // m)

    def start(self, generator: Generator) -> Tensor:
        """Codes [size] of ΔW = 0, initialised as PEFT does: w1 zero, the others He-uniform."""
        return _he_except(self.sites, self.shapes, 0, generator)

    def __call__(self, codes: Tensor) -> LoraWeights:
        down, up, layout = [], [], self.layout
        for w1, a2, b2 in _parts(codes, [self.shapes(s) for s in self.sites.sites]):
            n, m = w1.shape[-2:]
            if m <= n:
                left, right = _kron(w1, a2), _kron(torch.eye(m).to(w1), b2)
            else:
                left, right = _kron(torch.eye(n).to(w1), a2), _kron(w1, b2)
            missing = layout.rank - left.shape[-1]
            up.append(F.pad(left, (0, missing)))
            down.append(F.pad(right.expand(*left.shape[:-2], *right.shape[-2:]), (0, 0, 0, missing)))
        return LoraWeights(layout, tuple(down), tuple(up))


Space = Plain | Lightweight | Hadamard | Kronecker
KINDS: Final = ("lora", "lidb", "loha", "lokr")


def space(kind: str, layout: LoraLayout, inner: int | None = None, a: int = 100, b: int = 50) -> Space:
    """One of ``KINDS`` over the sites of ``layout``. ``inner`` is the rank inside LoHa and LoKr; unless given, it is
    the largest that a LoRA of the layout's rank can hold without loss (LoKr: at a factor of 4). ``a`` and ``b`` are
    LiDB's. Raises ``BadRequest`` for another kind."""
    match kind:
        case "lora":
            return Plain(layout)
        case "lidb":
            return Lightweight(LiDB(layout, a, b))
        case "loha":
            return Hadamard(layout, inner or max(1, int(layout.rank**0.5)))
        case "lokr":
            return Kronecker(layout, inner or max(1, layout.rank // 4))
    raise BadRequest(f"unknown space {kind!r}; known: {', '.join(KINDS)}")


def _he_except(
    layout: LoraLayout, shapes: Callable[[Site], tuple[tuple[int, int], ...]], zero: int, generator: Generator
) -> Tensor:
    """``kaiming_uniform_(a=√5)``, which is uniform in ± 1 / √columns, and zeros for the matrix in place ``zero``."""
    flat = []
    for site in layout.sites:
        for place, shape in enumerate(shapes(site)):
            scale = 0.0 if place == zero else shape[1] ** -0.5
            flat.append((torch.rand(shape, generator=generator).flatten() * 2 - 1) * scale)
    return torch.cat(flat)


def _parts(codes: Tensor, shapes: Sequence[tuple[tuple[int, int], ...]]) -> list[list[Tensor]]:
    sizes = [a * b for group in shapes for a, b in group]
    pieces = iter(codes.split(sizes, -1))
    return [[next(pieces).unflatten(-1, shape) for shape in group] for group in shapes]


def _kron(left: Tensor, right: Tensor) -> Tensor:
    """left [*batch, a, b] ⊗ right [*batch, c, d] = [*batch, a c, b d]."""
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2, -1)
