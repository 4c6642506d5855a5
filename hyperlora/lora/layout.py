"""``LoraLayout``: where a LoRA goes in one base model."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Final

from torch import nn

from hyperlora.errors import LayoutMismatch

UNKNOWN_BASE: Final = "unknown"
"""The base of a LoRA whose file does not name one."""


@dataclass(frozen=True)
class Site:
    """One adapted weight. ``name`` is ``component.module.path`` (``unet.mid_block....to_q``); ``fan_in`` counts the
    kernel for convolutions, whose LoRA is a ``kernel`` convolution to ``rank`` channels and a 1x1 one back (LoCon)."""

    name: str
    fan_in: int
    fan_out: int
    kernel: tuple[int, int] | None = None

    @property
    def component(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def path(self) -> str:
        return self.name.split(".", 1)[1]

    @property
    def reads_text(self) -> bool:
        """Whether it makes keys or values of a prompt's tokens (cross-attention of UNets)."""
        return self.path.endswith((".attn2.to_k", ".attn2.to_v"))


@dataclass(frozen=True)
class LoraLayout:
    """Ordered sites of one base model at one rank. ``base`` is the base model's id; numbers of different layouts never
    mix: ``require`` says in one sentence why not."""

    sites: tuple[Site, ...]
    rank: int
    base: str

    @classmethod
    def of(
        cls, module: nn.Module, component: str, matches: Callable[[str], bool], rank: int, base: str
    ) -> "LoraLayout":
        """The layout of every Linear or Conv2d in ``module`` (meta device is fine) whose path ``matches``.

        Raises ``LayoutMismatch`` if there is none.
        """
        sites = tuple(
            _site(f"{component}.{path}", layer)
            for path, layer in module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and matches(path)
        )
        if not sites:
            raise LayoutMismatch(f"no site of the preset exists in {type(module).__name__}: choose another preset")
        return cls(sites, rank, base)

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site.component for site in self.sites))

    @property
    def numel(self) -> int:
        """Numbers in one LoRA of this layout."""
        return sum(self.rank * (site.fan_in + site.fan_out) for site in self.sites)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any site, shape, order, rank or base id."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def with_rank(self, rank: int) -> "LoraLayout":
        return replace(self, rank=rank)

    def __add__(self, other: "LoraLayout") -> "LoraLayout":
        """The sites of both, e.g. of a UNet and its text encoder (same rank and base)."""
        self.require(LoraLayout(self.sites, other.rank, other.base))
        return replace(self, sites=self.sites + other.sites)

    def require(self, other: "LoraLayout", *, any_rank: bool = False) -> None:
        """Raise ``LayoutMismatch`` unless ``other`` has the same sites, base and (unless ``any_rank``) rank."""
        other.require_base(self.base)
        mine, theirs = {s.name: s for s in self.sites}, {s.name: s for s in other.sites}
        if missing := mine.keys() ^ theirs.keys():
            raise LayoutMismatch(
                f"the LoRA has {len(theirs)} sites, {len(mine)} expected; {len(missing)} differ, e.g. {min(missing)}"
            )
        for name, site in mine.items():
            if site != theirs[name]:
                raise LayoutMismatch(f"site {name} is {_shape(theirs[name])} in the LoRA, {_shape(site)} expected")
        if self.sites != other.sites:
            raise LayoutMismatch("the LoRA's sites are in another order than expected")
        if not any_rank and self.rank != other.rank:
            raise LayoutMismatch(f"the LoRA has rank {other.rank}, rank {self.rank} expected: resize it first")

    def require_base(self, base: str) -> None:
        """Raise ``LayoutMismatch`` unless LoRAs of this layout are for ``base``."""
        if self.base != base:
            raise LayoutMismatch(f"the LoRA is for base {self.base!r}, this base is {base!r}: use its own base")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LoraLayout":
        """Inverse of ``to_dict`` (also after a trip through JSON)."""
        sites = (
            Site(s["name"], s["fan_in"], s["fan_out"], tuple(s["kernel"]) if s["kernel"] else None)
            for s in data["sites"]
        )
        return cls(tuple(sites), data["rank"], data["base"])


def _site(name: str, layer: nn.Linear | nn.Conv2d) -> Site:
    if isinstance(layer, nn.Linear):
        return Site(name, layer.in_features, layer.out_features)
    kernel = (int(layer.kernel_size[0]), int(layer.kernel_size[1]))
    return Site(name, layer.in_channels // layer.groups * kernel[0] * kernel[1], layer.out_channels, kernel)


def _shape(site: Site) -> str:
    return f"{site.fan_in}→{site.fan_out}" + (f" ({site.kernel[0]}x{site.kernel[1]} conv)" if site.kernel else "")
