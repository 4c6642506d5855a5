"""``LoraWeights``: the numbers of one LoRA, or of a batch of them, over one layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hyperlora.errors import LayoutMismatchError
from hyperlora.lora.layout import LoraLayout

if TYPE_CHECKING:
    from hyperlora.lora.io.metadata import LoraMetadata


@dataclass(frozen=True)
class LoraWeights:
    """Per site (in layout order) ``down`` [*batch, rank, fan_in] and ``up`` [*batch, fan_out, rank]; scale folded.

    Example: ``(2 * glasses - beard).resize(4)`` is a rank-4 LoRA of twice one change minus another.
    """

    layout: LoraLayout
    down: tuple[Tensor, ...]
    up: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not len(self.down) == len(self.up) == len(self.layout.targets):
            raise LayoutMismatchError(
                f"{len(self.down)} sites given, the layout has {len(self.layout.targets)}"
            )
        for target, down, up in zip(self.layout.targets, self.down, self.up, strict=True):
            expected = (
                (self.layout.rank, target.in_features),
                (target.out_features, self.layout.rank),
            )
            if (down.shape[-2:], up.shape[-2:]) != expected or down.shape[:-2] != up.shape[:-2]:
                raise LayoutMismatchError(
                    f"{target.name}: down {list(down.shape)}, up {list(up.shape)}; expected {expected}"
                )

    @classmethod
    def zeros(
        cls, layout: LoraLayout, batch_shape: Sequence[int] = (), std: float = 0.0
    ) -> "LoraWeights":
        """ΔW = 0. With ``std`` > 0 the ``down`` factors are random, as fitting needs (else no gradient flows)."""
        down = tuple(
            std * torch.randn(*batch_shape, layout.rank, target.in_features)
            for target in layout.targets
        )
        return cls(
            layout,
            down,
            tuple(
                torch.zeros(*batch_shape, target.out_features, layout.rank)
                for target in layout.targets
            ),
        )

    @classmethod
    def stack(cls, loras: Sequence["LoraWeights"]) -> "LoraWeights":
        """One batch of several LoRAs of one layout; undone by iterating."""
        for other in loras[1:]:
            loras[0].layout.check_compatible(other.layout)
        down = tuple(torch.stack(d) for d in zip(*(lora.down for lora in loras), strict=True))
        return cls(
            loras[0].layout,
            down,
            tuple(torch.stack(u) for u in zip(*(lora.up for lora in loras), strict=True)),
        )

    @property
    def batch_shape(self) -> torch.Size:
        return self.down[0].shape[:-2]

    def __len__(self) -> int:
        """LoRAs in the batch. Raises ``TypeError`` without batch axis."""
        if not self.batch_shape:
            raise TypeError("this LoRA has no batch axis")
        return self.batch_shape[0]

    def __bool__(self) -> bool:
        return True  # not its length

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> "LoraWeights":
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError(index)  # so that iterating ends
        return LoraWeights(
            self.layout, tuple(d[index] for d in self.down), tuple(u[index] for u in self.up)
        )

    def apply(self, fn: Callable[[Tensor], Tensor]) -> "LoraWeights":
        """``fn`` on every tensor, e.g. ``lambda t: t.to("cuda")``."""
        return LoraWeights(self.layout, tuple(map(fn, self.down)), tuple(map(fn, self.up)))

    def save(
        self,
        path: str | PathLike[str],
        format: Literal["diffusers", "kohya", "sgm"] = "diffusers",
        metadata: "LoraMetadata | None" = None,
    ) -> Path:
        """Write this LoRA (no batch axis) as ``main_callback.lora.io.save.save_lora`` does; undone by ``load_lora``."""
        from hyperlora.lora.io.save import (
            save_lora,
        )  # the one step up: files know LoRAs, this only opens their door

        return save_lora(self, path, format=format, metadata=metadata)

    def detach(self) -> "LoraWeights":
        return self.apply(torch.Tensor.detach)

    def flatten(self) -> Tensor:
        """[*batch, numel] in layout order, per site down then up."""
        parts = (t.flatten(-2) for pair in zip(self.down, self.up, strict=True) for t in pair)
        return torch.cat(tuple(parts), -1)

    @classmethod
    def unflatten(cls, layout: LoraLayout, flat: Tensor) -> "LoraWeights":
        """Inverse of ``flatten``. Raises ``LayoutMismatchError`` if the last axis is not ``layout.numel`` long."""
        if flat.shape[-1] != layout.numel:
            raise LayoutMismatchError(
                f"{flat.shape[-1]} numbers given, the layout has {layout.numel}"
            )
        sizes = [
            n
            for target in layout.targets
            for n in (layout.rank * target.in_features, target.out_features * layout.rank)
        ]
        parts = flat.split(sizes, -1)
        down = (
            p.unflatten(-1, (layout.rank, target.in_features))
            for p, target in zip(parts[::2], layout.targets, strict=True)
        )
        up = (
            p.unflatten(-1, (target.out_features, layout.rank))
            for p, target in zip(parts[1::2], layout.targets, strict=True)
        )
        return cls(layout, tuple(down), tuple(up))

    def get_delta_weights(self) -> tuple[Tensor, ...]:
        """ΔW = up @ down per site, [*batch, fan_out, fan_in]."""
        return tuple(u @ d for d, u in zip(self.down, self.up, strict=True))

    def compute_delta_norms(self) -> Tensor:
        """Frobenius norm of ΔW per site, [*batch, sites], without forming ΔW: tr(uᵀu ddᵀ)."""
        squared_norms = (
            ((u.mT @ u) * (d @ d.mT)).sum((-2, -1)) for d, u in zip(self.down, self.up, strict=True)
        )
        return torch.stack(tuple(squared_norms), -1).clamp_min(0).sqrt()

    def compute_mean_squared_norm(self) -> Tensor:
        """‖ΔW‖², the mean over batch and sites; unlike ``compute_delta_norms`` it has a gradient at ΔW = 0, where training begins."""
        squared_norms = (
            ((u.mT @ u) * (d @ d.mT)).sum((-2, -1)) for d, u in zip(self.down, self.up, strict=True)
        )
        return torch.stack(tuple(squared_norms)).mean()

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
        self.layout.check_compatible(other.layout, ignore_rank=True)
        down = tuple(torch.cat(pair, -2) for pair in zip(self.down, other.down, strict=True))
        up = tuple(torch.cat(pair, -1) for pair in zip(self.up, other.up, strict=True))
        return LoraWeights(self.layout.with_rank(self.layout.rank + other.layout.rank), down, up)

    def __sub__(self, other: "LoraWeights") -> "LoraWeights":
        return self + -other

    def resize(self, rank: int) -> "LoraWeights":
        """The best rank-``rank`` approximation of ΔW (SVD), factors balanced; exact when ``rank`` is no smaller."""
        factors = [_resize_factors(d, u, rank) for d, u in zip(self.down, self.up, strict=True)]
        return LoraWeights(
            self.layout.with_rank(rank), tuple(d for d, _ in factors), tuple(u for _, u in factors)
        )

    def canonicalize(self) -> "LoraWeights":
        """The same ΔW with downᵀ and up of equal singular values, unique up to signs: comparable between LoRAs."""
        return self.resize(self.layout.rank)

    def mean(self) -> "LoraWeights":
        """The LoRA whose ΔW is the mean over the batch axis, at the same rank (SVD)."""
        n, rank = len(self), self.layout.rank
        down = tuple(d.flatten(0, 1) for d in self.down)  # [n * rank, fan_in]
        up = tuple(u.movedim(0, 1).flatten(1) / n for u in self.up)  # [fan_out, n * rank]
        return LoraWeights(self.layout.with_rank(n * rank), down, up).resize(rank)


def _resize_factors(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
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
