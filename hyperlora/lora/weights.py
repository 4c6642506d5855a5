"""``LoraWeights``: the numbers of one LoRA, or of a batch of them, over one layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hyperlora.errors import LayoutMismatch
from hyperlora.lora.layout import LoraLayout

if TYPE_CHECKING:
    from hyperlora.lora.io.metadata import LoraHeader


@dataclass(frozen=True)
class LoraWeights:
    """Per site (in layout order) ``down`` [*batch, rank, fan_in] and ``up`` [*batch, fan_out, rank]; scale folded.

    Example: ``(2 * glasses - beard).resize(4)`` is a rank-4 LoRA of twice one change minus another.
    """

    layout: LoraLayout
    down: tuple[Tensor, ...]
    up: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not len(self.down) == len(self.up) == len(self.layout.sites):
            raise LayoutMismatch(f"{len(self.down)} sites given, the layout has {len(self.layout.sites)}")
        for site, down, up in zip(self.layout.sites, self.down, self.up, strict=True):
            expected = (self.layout.rank, site.fan_in), (site.fan_out, self.layout.rank)
            if (down.shape[-2:], up.shape[-2:]) != expected or down.shape[:-2] != up.shape[:-2]:
                raise LayoutMismatch(f"{site.name}: down {list(down.shape)}, up {list(up.shape)}; expected {expected}")

    @classmethod
    def zeros(cls, layout: LoraLayout, batch: Sequence[int] = (), std: float = 0.0) -> "LoraWeights":
        """ΔW = 0. With ``std`` > 0 the ``down`` factors are random, as fitting needs (else no gradient flows)."""
        down = tuple(std * torch.randn(*batch, layout.rank, s.fan_in) for s in layout.sites)
        return cls(layout, down, tuple(torch.zeros(*batch, s.fan_out, layout.rank) for s in layout.sites))

    @classmethod
    def stack(cls, loras: Sequence["LoraWeights"]) -> "LoraWeights":
        """One batch of several LoRAs of one layout; undone by iterating."""
        for other in loras[1:]:
            loras[0].layout.require(other.layout)
        down = tuple(torch.stack(d) for d in zip(*(lora.down for lora in loras), strict=True))
        return cls(loras[0].layout, down, tuple(torch.stack(u) for u in zip(*(lora.up for lora in loras), strict=True)))

    @property
    def batch(self) -> torch.Size:
        return self.down[0].shape[:-2]

    def __len__(self) -> int:
        """LoRAs in the batch. Raises ``TypeError`` without batch axis."""
        if not self.batch:
            raise TypeError("this LoRA has no batch axis")
        return self.batch[0]

    def __bool__(self) -> bool:
        return True  # not its length

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> "LoraWeights":
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError(index)  # so that iterating ends
        return LoraWeights(self.layout, tuple(d[index] for d in self.down), tuple(u[index] for u in self.up))

    def map(self, function: Callable[[Tensor], Tensor]) -> "LoraWeights":
        """``function`` on every tensor, e.g. ``lambda t: t.to("cuda")``."""
        return LoraWeights(self.layout, tuple(map(function, self.down)), tuple(map(function, self.up)))

    def save(
        self,
        path: str | PathLike[str],
        format: Literal["diffusers", "kohya", "sgm"] = "diffusers",
        header: "LoraHeader | None" = None,
    ) -> Path:
        """Write this LoRA (no batch axis) as ``hyperlora.lora.io.save.save_lora`` does; undone by ``load_lora``."""
        from hyperlora.lora.io.save import save_lora  # the one step up: files know LoRAs, this only opens their door

        return save_lora(self, path, format=format, header=header)

    def detach(self) -> "LoraWeights":
        return self.map(torch.Tensor.detach)

    def flatten(self) -> Tensor:
        """[*batch, numel] in layout order, per site down then up."""
        parts = (t.flatten(-2) for pair in zip(self.down, self.up, strict=True) for t in pair)
        return torch.cat(tuple(parts), -1)

    @classmethod
    def unflatten(cls, layout: LoraLayout, flat: Tensor) -> "LoraWeights":
        """Inverse of ``flatten``. Raises ``LayoutMismatch`` if the last axis is not ``layout.numel`` long."""
        if flat.shape[-1] != layout.numel:
            raise LayoutMismatch(f"{flat.shape[-1]} numbers given, the layout has {layout.numel}")
        sizes = [n for s in layout.sites for n in (layout.rank * s.fan_in, s.fan_out * layout.rank)]
        parts = flat.split(sizes, -1)
        down = (p.unflatten(-1, (layout.rank, s.fan_in)) for p, s in zip(parts[::2], layout.sites, strict=True))
        up = (p.unflatten(-1, (s.fan_out, layout.rank)) for p, s in zip(parts[1::2], layout.sites, strict=True))
        return cls(layout, tuple(down), tuple(up))

    def delta(self) -> tuple[Tensor, ...]:
        """ΔW = up @ down per site, [*batch, fan_out, fan_in]."""
        return tuple(u @ d for d, u in zip(self.down, self.up, strict=True))

    def norms(self) -> Tensor:
        """Frobenius norm of ΔW per site, [*batch, sites], without forming ΔW: tr(uᵀu ddᵀ)."""
        squares = (((u.mT @ u) * (d @ d.mT)).sum((-2, -1)) for d, u in zip(self.down, self.up, strict=True))
        return torch.stack(tuple(squares), -1).clamp_min(0).sqrt()

    def squared_norm(self) -> Tensor:
        """‖ΔW‖², the mean over batch and sites; unlike ``norms`` it has a gradient at ΔW = 0, where training begins."""
        squares = (((u.mT @ u) * (d @ d.mT)).sum((-2, -1)) for d, u in zip(self.down, self.up, strict=True))
        return torch.stack(tuple(squares)).mean()

    def __mul__(self, strength: float | Tensor) -> "LoraWeights":
        """ΔW times a number, or times one per LoRA of the batch ([*batch])."""
        if isinstance(strength, Tensor) and strength.ndim:
            strength = strength[..., None, None]
        return LoraWeights(self.layout, self.down, tuple(u * strength for u in self.up))

    __rmul__ = __mul__

    def __neg__(self) -> "LoraWeights":
        return self * -1.0

    def __add__(self, other: "LoraWeights") -> "LoraWeights":
        """Exact sum of the two ΔW; the ranks add (``resize`` brings it back)."""
        self.layout.require(other.layout, any_rank=True)
        down = tuple(torch.cat(pair, -2) for pair in zip(self.down, other.down, strict=True))
        up = tuple(torch.cat(pair, -1) for pair in zip(self.up, other.up, strict=True))
        return LoraWeights(self.layout.with_rank(self.layout.rank + other.layout.rank), down, up)

    def __sub__(self, other: "LoraWeights") -> "LoraWeights":
        return self + -other

    def resize(self, rank: int) -> "LoraWeights":
        """The best rank-``rank`` approximation of ΔW (SVD), factors balanced; exact when ``rank`` is no smaller."""
        pairs = [_truncated(d, u, rank) for d, u in zip(self.down, self.up, strict=True)]
        return LoraWeights(self.layout.with_rank(rank), tuple(d for d, _ in pairs), tuple(u for _, u in pairs))

    def balance(self) -> "LoraWeights":
        """The same ΔW with downᵀ and up of equal singular values, unique up to signs: comparable between LoRAs."""
        return self.resize(self.layout.rank)

    def mean(self) -> "LoraWeights":
        """The LoRA whose ΔW is the mean over the batch axis, at the same rank (SVD)."""
        n, rank = len(self), self.layout.rank
        down = tuple(d.flatten(0, 1) for d in self.down)  # [n * rank, fan_in]
        up = tuple(u.movedim(0, 1).flatten(1) / n for u in self.up)  # [fan_out, n * rank]
        return LoraWeights(self.layout.with_rank(n * rank), down, up).resize(rank)


def _truncated(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    dtype = down.dtype
    q_up, r_up = torch.linalg.qr(up.float())  # up = q_up r_up
    q_down, r_down = torch.linalg.qr(down.float().mT)  # down = r_downᵀ q_downᵀ
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    k = min(rank, s.shape[-1])
    root = s[..., :k].sqrt()
    up = (q_up @ u[..., :k]) * root[..., None, :]
    down = root[..., :, None] * (vh[..., :k, :] @ q_down.mT)
    if k < rank:  # fewer directions than asked for exist: the rest is zero
        down = torch.cat([down, down.new_zeros(*down.shape[:-2], rank - k, down.shape[-1])], -2)
        up = torch.cat([up, up.new_zeros(*up.shape[:-1], rank - k)], -1)
    return down.to(dtype), up.to(dtype)
