"""``LoraLayout``: where a LoRA goes in one base model."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Final

from torch import nn

from hyperlora.errors import LayoutMismatchError

UNKNOWN_BASE: Final = "unknown"
"""The base of a LoRA whose file does not name one."""


@dataclass(frozen=True)
class TargetModule:
    """One adapted weight. ``name`` is ``component.module.path`` (``unet.mid_block....to_q``); ``in_features`` counts the
    kernel for convolutions, whose LoRA is a ``kernel_size`` convolution to ``rank`` channels and a 1x1 one back (LoCon)."""

    name: str
    in_features: int
    out_features: int
    kernel_size: tuple[int, int] | None = None

    @property
    def component(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def path(self) -> str:
        return self.name.split(".", 1)[1]

    @property
    def is_text_projection(self) -> bool:
        """Whether it makes keys or values of a prompt's tokens (cross-attention of UNets)."""
        return self.path.endswith((".attn2.to_k", ".attn2.to_v"))


@dataclass(frozen=True)
class LoraLayout:
    """Ordered sites of one base model at one rank. ``base`` is the base model's id; numbers of different layouts never
    mix: ``check_compatible`` says in one sentence why not."""

    targets: tuple[TargetModule, ...]
    rank: int
    base: str

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        component: str,
        filter_fn: Callable[[str], bool],
        rank: int,
        base: str,
    ) -> "LoraLayout":
        """The layout of every Linear or Conv2d in ``module`` (meta device is fine) whose path ``filter_fn``.

        Raises ``LayoutMismatchError`` if there is none.
        """
        targets = tuple(
            _make_target(f"{component}.{path}", layer)
            for path, layer in module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and filter_fn(path)
        )
        if not targets:
            raise LayoutMismatchError(
                f"no site of the preset exists in {type(module).__name__}: choose another preset"
            )
        return cls(targets, rank, base)

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(target.component for target in self.targets))

    @property
    def numel(self) -> int:
        """Numbers in one LoRA of this layout."""
        return sum(
            self.rank * (target.in_features + target.out_features) for target in self.targets
        )

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any site, shape, order, rank or base id."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def with_rank(self, rank: int) -> "LoraLayout":
        return replace(self, rank=rank)

    def __add__(self, other: "LoraLayout") -> "LoraLayout":
        """The sites of both, e.g. of a UNet and its text encoder (same rank and base)."""
        self.check_compatible(LoraLayout(self.targets, other.rank, other.base))
        return replace(self, sites=self.targets + other.targets)

    def check_compatible(self, other: "LoraLayout", *, ignore_rank: bool = False) -> None:
        """Raise ``LayoutMismatchError`` unless ``other`` has the same sites, base and (unless ``ignore_rank``) rank."""
        other.check_base(self.base)
        own_targets, other_targets = (
            {s.name: s for s in self.targets},
            {s.name: s for s in other.targets},
        )
        if missing := own_targets.keys() ^ other_targets.keys():
            raise LayoutMismatchError(
                f"the LoRA has {len(other_targets)} sites, {len(own_targets)} expected; {len(missing)} differ, e.g. {min(missing)}"
            )
        for name, target in own_targets.items():
            if target != other_targets[name]:
                raise LayoutMismatchError(
                    f"site {name} is {_format_shape(other_targets[name])} in the LoRA, {_format_shape(target)} expected"
                )
        if self.targets != other.targets:
            raise LayoutMismatchError("the LoRA's sites are in another order than expected")
        if not ignore_rank and self.rank != other.rank:
            raise LayoutMismatchError(
                f"the LoRA has rank {other.rank}, rank {self.rank} expected: resize it first"
            )

    def check_base(self, base: str) -> None:
        """Raise ``LayoutMismatchError`` unless LoRAs of this layout are for ``base``."""
        if self.base != base:
            raise LayoutMismatchError(
                f"the LoRA is for base {self.base!r}, this base is {base!r}: use its own base"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LoraLayout":
        """Inverse of ``source_to_dict`` (also after a trip through JSON)."""
        targets = (
            TargetModule(
                target["name"],
                target["fan_in"],
                target["fan_out"],
                tuple(target["kernel"]) if target["kernel"] else None,
            )
            for target in data["sites"]
        )
        return cls(tuple(targets), data["rank"], data["base"])


def _make_target(name: str, layer: nn.Linear | nn.Conv2d) -> TargetModule:
    if isinstance(layer, nn.Linear):
        return TargetModule(name, layer.in_features, layer.out_features)
    kernel_size = (int(layer.kernel_size[0]), int(layer.kernel_size[1]))
    return TargetModule(
        name,
        layer.in_channels // layer.groups * kernel_size[0] * kernel_size[1],
        layer.out_channels,
        kernel_size,
    )


def _format_shape(target: TargetModule) -> str:
    return f"{target.in_features}→{target.out_features}" + (
        f" ({target.kernel_size[0]}x{target.kernel_size[1]} conv)" if target.kernel_size else ""
    )
