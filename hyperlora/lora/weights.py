"""``LoraWeights``: the numbers of one LoRA, or of a batch of LoRAs, over one layout.

    y = W x + up (down x)          ΔW = up @ down

    x [in] ─┬─ W [out, in] ─────────────────────── + ── y [out]
            └─ down [rank, in] ── up [out, rank] ──┘

Example at rank 2: a Linear layer 320 → 640 has ΔW [640, 320] = up [640, 2] @ down [2, 320],
1,920 numbers instead of 204,800. The scale alpha / rank of LoRA files is folded into ``up``.

Shapes in comments: *B is any number of batch axes, r the rank, in and out the features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from hyperlora.errors import LayoutMismatchError
from hyperlora.lora.factors import resize_factors
from hyperlora.lora.layout import LoraLayout


@dataclass(frozen=True)
class LoraWeights:
    """The factors of ΔW = up @ down at every target of a layout, with any batch axes.

    Example: ``(2 * glasses - beard).resize(4)`` is a rank-4 LoRA of twice one edit minus another.

    Attributes:
        layout: The targets, their order and the rank.
        down: Per target, [*batch, rank, in_features].
        up: Per target, [*batch, out_features, rank]; the scale alpha / rank is folded in.

    Raises:
        LayoutMismatchError: The number or the shapes of the tensors do not fit the layout.
    """

    layout: LoraLayout
    down: tuple[Tensor, ...]
    up: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        num_targets, rank = len(self.layout.targets), self.layout.rank
        if not len(self.down) == len(self.up) == num_targets:
            raise LayoutMismatchError(
                f"{len(self.down)} targets given, the layout has {num_targets}"
            )
        # A wrong shape would otherwise fail, or broadcast, inside a forward pass of the base.
        for target, down, up in zip(self.layout.targets, self.down, self.up, strict=True):
            expected = ((rank, target.in_features), (target.out_features, rank))
            if (down.shape[-2:], up.shape[-2:]) != expected or down.shape[:-2] != up.shape[:-2]:
                raise LayoutMismatchError(
                    f"{target.name}: down {list(down.shape)}, up {list(up.shape)}; "
                    f"expected {expected}"
                )

    @classmethod
    def zeros(
        cls,
        layout: LoraLayout,
        batch_shape: Sequence[int] = (),
        std: float = 0.0,
        generator: Generator | None = None,
    ) -> "LoraWeights":
        """Make LoRAs of ΔW = 0: ``up`` is zero, ``down`` is zero or random.

        Args:
            layout: The targets and the rank.
            batch_shape: The batch axes; none by default.
            std: Standard deviation of ``down``. Optimization needs more than 0: at zero factors
                the gradient vanishes.
            generator: Source of the random numbers, by default the global one.

        Returns:
            LoRAs of the given batch shape.
        """
        # ∂L/∂up = (∂L/∂ΔW) downᵀ and ∂L/∂down = upᵀ (∂L/∂ΔW): one factor must not be zero
        down = tuple(  # [*B, r, in] each
            std * torch.randn(*batch_shape, layout.rank, target.in_features, generator=generator)
            for target in layout.targets
        )
        up = tuple(  # [*B, out, r] each; the zeros that make ΔW = 0
            torch.zeros(*batch_shape, target.out_features, layout.rank) for target in layout.targets
        )
        return cls(layout, down, up)

    @classmethod
    def init_batch(
        cls,
        layout: LoraLayout,
        num_loras: int,
        seed: int,
        device: torch.device | str | None = None,
    ) -> "LoraWeights":
        """Make the start of an optimization: ``num_loras`` equal LoRAs of ΔW = 0.

        Args:
            layout: The targets and the rank.
            num_loras: The length of the batch axis.
            seed: Seed of the random ``down`` factors, of standard deviation ``layout.init_std``.
            device: Where the tensors are, by default the CPU.

        Returns:
            A batch [num_loras] whose members share their memory; ``flatten`` copies.
        """
        generator = torch.Generator().manual_seed(seed)  # of the CPU: equal on every device
        lora = cls.zeros(layout, (), layout.init_std, generator)  # [r, in] and [out, r]
        # expand: stride 0 along the batch axis, so num_loras members need the memory of one
        return lora.apply(lambda t: t.to(device).expand(num_loras, *t.shape))

    @classmethod
    def stack(cls, loras: Sequence["LoraWeights"]) -> "LoraWeights":
        """Stack LoRAs of one layout along a new first batch axis; iterating is the inverse.

        Raises:
            LayoutMismatchError: The layouts differ.
        """
        layout = loras[0].layout
        for lora in loras[1:]:
            layout.check_compatible(lora.layout)
        # zip(*…) regroups by target: [loras, *B, r, in] and [loras, *B, out, r] each
        down = tuple(torch.stack(d) for d in zip(*(lora.down for lora in loras), strict=True))
        up = tuple(torch.stack(u) for u in zip(*(lora.up for lora in loras), strict=True))
        return cls(layout, down, up)

    @property
    def batch_shape(self) -> torch.Size:
        """Sizes of the batch axes; empty for one LoRA."""
        return self.down[0].shape[:-2]  # all axes before those of the matrix, (r, in)

    def __len__(self) -> int:
        """Count the LoRAs along the first batch axis.

        Raises:
            TypeError: There is no batch axis.
        """
        if not self.batch_shape:
            raise TypeError("this LoRA has no batch axis")
        return self.batch_shape[0]

    def __bool__(self) -> bool:
        """Return True, also for an empty batch."""
        return True  # without this method, bool() would call __len__

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> "LoraWeights":
        """Select LoRAs along the first batch axis.

        Raises:
            IndexError: The index is out of range.
        """
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError(index)  # so that iteration ends
        return self.apply(lambda t: t[index])  # an int drops the axis, a slice or a list keeps it

    def shuffle_batch(self) -> "LoraWeights":
        """Rotate the batch by one, as a control: every sample gets the LoRA of another one."""
        # sample i gets LoRA i - 1; a random permutation could leave some samples their own
        return self[torch.arange(len(self), device=self.device).roll(1)]

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self.down[0].device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "LoraWeights":
        """Move every tensor, as ``Tensor.to`` does.

        Args:
            device: Where the tensors are to be.
            dtype: Their precision; by default as it is.

        Returns:
            The LoRA there.
        """
        return self.apply(lambda t: t.to(device, dtype))

    def apply(self, fn: Callable[[Tensor], Tensor]) -> "LoraWeights":
        """Apply ``fn`` to every tensor, e.g. ``torch.Tensor.double``."""
        return LoraWeights(self.layout, tuple(map(fn, self.down)), tuple(map(fn, self.up)))

    def detach(self) -> "LoraWeights":
        """Detach every tensor from the autograd graph."""
        return self.apply(torch.Tensor.detach)

    def flatten(self) -> Tensor:
        """Concatenate all numbers in layout order, per target ``down`` then ``up``.

        Returns:
            [*batch, layout.numel]; ``unflatten`` is the inverse.
        """
        # down_0, up_0, down_1, up_1, …: datasets hold rows of this order, so it is fixed
        factors = (t for pair in zip(self.down, self.up, strict=True) for t in pair)
        return torch.cat([t.flatten(-2) for t in factors], -1)  # [*B, Σ_targets r (in + out)]

    @classmethod
    def unflatten(cls, layout: LoraLayout, flat: Tensor) -> "LoraWeights":
        """Split flat vectors into the factors of every target; the inverse of ``flatten``.

        Args:
            layout: The targets and the rank.
            flat: [*batch, layout.numel].

        Returns:
            LoRAs of batch shape [*batch], whose tensors are views of ``flat``.

        Raises:
            LayoutMismatchError: The last axis is not ``layout.numel`` long.
        """
        if flat.shape[-1] != layout.numel:
            raise LayoutMismatchError(
                f"{flat.shape[-1]} numbers given, the layout has {layout.numel}"
            )
        rank = layout.rank
        shapes = [  # (r, in), (out, r) of target 0, then of target 1, …
            shape
            for target in layout.targets
            for shape in ((rank, target.in_features), (target.out_features, rank))
        ]
        pieces = flat.split([rows * columns for rows, columns in shapes], -1)  # [*B, r in], …
        factors = [p.unflatten(-1, shape) for p, shape in zip(pieces, shapes, strict=True)]
        return cls(layout, tuple(factors[::2]), tuple(factors[1::2]))  # even: down, odd: up

    def get_delta_weights(self) -> tuple[Tensor, ...]:
        """Compute ΔW = up @ down per target.

        Returns:
            Per target, [*batch, out_features, in_features].
        """
        # [*B, out, r] @ [*B, r, in]: as large as W itself, hence the norms without it below
        return tuple(up @ down for down, up in zip(self.down, self.up, strict=True))

    def compute_delta_norms(self) -> Tensor:
        """Compute the Frobenius norm of ΔW per target, without forming ΔW.

        Returns:
            [*batch, targets].
        """
        # where ΔW is a difference of equal LoRAs, rounding gives e.g. -0.002, and √ of it NaN
        return torch.stack(self._compute_squared_norms(), -1).clamp_min(0).sqrt()

    def compute_mean_squared_norm(self) -> Tensor:
        """Compute the mean of ‖ΔW‖² over batch and targets.

        Unlike the norm, its square is differentiable at ΔW = 0, where training begins.

        Returns:
            A scalar.
        """
        return torch.stack(self._compute_squared_norms()).mean()  # of [targets, *B]

    def _compute_squared_norms(self) -> list[Tensor]:
        """‖up down‖² = tr(upᵀ up · down downᵀ), per target [*batch]."""
        squared_norms = []
        for down, up in zip(self.down, self.up, strict=True):
            # cost r² (in + out) instead of r · in · out
            gram_up = up.mT @ up  # [*B, r, r]
            gram_down = down @ down.mT  # [*B, r, r]
            # tr(P Q) = Σ_ij P_ij Q_ij, since Q is symmetric
            squared_norms.append((gram_up * gram_down).sum((-2, -1)))  # [*B]
        return squared_norms

    def __mul__(self, strength: float | Tensor) -> "LoraWeights":
        """Scale ΔW by one number, or by one number per LoRA [*batch]."""
        if isinstance(strength, Tensor) and strength.ndim:
            strength = strength[..., None, None]  # [*B, 1, 1]
        # up alone: scaling both factors would scale ΔW by strength²
        return LoraWeights(self.layout, self.down, tuple(up * strength for up in self.up))

    __rmul__ = __mul__

    def __neg__(self) -> "LoraWeights":
        """Negate ΔW."""
        return self * -1.0

    def __add__(self, other: "LoraWeights") -> "LoraWeights":
        """Add ΔW exactly; the ranks add up, ``resize`` reduces them.

        [up₁ up₂] · [down₁; down₂] = up₁ down₁ + up₂ down₂

        Raises:
            LayoutMismatchError: The layouts differ in more than rank.
        """
        self.layout.check_compatible(other.layout, ignore_rank=True)
        # along the axis r: down [*B, r₁ + r₂, in], up [*B, out, r₁ + r₂]
        down = tuple(torch.cat(pair, -2) for pair in zip(self.down, other.down, strict=True))
        up = tuple(torch.cat(pair, -1) for pair in zip(self.up, other.up, strict=True))
        return LoraWeights(self.layout.with_rank(self.layout.rank + other.layout.rank), down, up)

    def __sub__(self, other: "LoraWeights") -> "LoraWeights":
        """Subtract ΔW exactly; the ranks add up.

        Raises:
            LayoutMismatchError: The layouts differ in more than rank.
        """
        return self + -other

    def resize(self, rank: int) -> "LoraWeights":
        """Compute the best approximation of ΔW at another rank, by SVD.

        Args:
            rank: The new rank; ΔW stays exact where it is no smaller than the rank of ΔW.

        Returns:
            LoRAs whose ``down`` and ``up`` have equal singular values.

        Raises:
            InvalidArgumentError: The rank is below 1, or grows above what any target has.
        """
        if rank < 1 or rank > self.layout.rank:
            self.layout.check_rank(rank)
        # per target: the lost part of ΔW has the norm √(Σ_{i > rank} s_i²), the least possible
        factors = [
            resize_factors(down, up, rank) for down, up in zip(self.down, self.up, strict=True)
        ]
        down, up = zip(*factors, strict=True)  # [*B, rank, in] and [*B, out, rank] each
        return LoraWeights(self.layout.with_rank(rank), down, up)

    def canonicalize(self) -> "LoraWeights":
        """Rewrite the same ΔW with factors of equal singular values.

        The factors are then unique up to the sign of each direction, so LoRAs can be compared.
        """
        return self.resize(self.layout.rank)

    def mean(self) -> "LoraWeights":
        """Average ΔW over the batch axis, at the same rank (SVD).

        mean ΔW = [up₁/n … up_n/n] · [down₁; …; down_n]
        """
        num_loras, rank = len(self), self.layout.rank
        # Means of down and of up would add the products up_i down_j of different LoRAs.
        # Row i r + k of down and column i r + k of up both belong to direction k of LoRA i.
        down = tuple(d.flatten(0, 1) for d in self.down)  # [n * r, in]
        up = tuple(u.movedim(0, 1).flatten(1) / num_loras for u in self.up)  # [out, n * r]
        return LoraWeights(self.layout.with_rank(num_loras * rank), down, up).resize(rank)
