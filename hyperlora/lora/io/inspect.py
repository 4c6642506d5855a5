"""``describe``: what a LoRA file is, for ``hyperlora inspect`` and the service."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraHeader
from hyperlora.lora.io.state_dict import LoraFormat
from hyperlora.lora.layout import LoraLayout


@dataclass(frozen=True)
class LoraDescription:
    """``ranks`` counts sites per rank; ``norms`` is ‖ΔW‖ (Frobenius) per component and ``norm`` of all together."""

    name: str
    format: LoraFormat
    size: int
    base: str
    fingerprint: str
    components: tuple[str, ...]
    sites: int
    numbers: int
    ranks: dict[int, int]
    norm: float
    norms: dict[str, float]
    header: LoraHeader

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(
    path: str | PathLike[str], layout: LoraLayout | None = None, modules: Mapping[str, nn.Module] | None = None
) -> LoraDescription:
    """Read ``path`` as ``load_lora`` does (same errors) and sum it up."""
    file = load_lora(path, layout, modules)
    found = file.weights.layout
    squares = dict.fromkeys(found.components, 0.0)
    for site, norm in zip(found.sites, file.weights.norms().tolist(), strict=True):
        squares[site.component] += norm**2
    return LoraDescription(
        name=Path(path).name,
        format=file.format,
        size=file.size,
        base=found.base,
        fingerprint=found.fingerprint,
        components=found.components,
        sites=len(found.sites),
        numbers=found.numel,
        ranks=dict(sorted(Counter(file.ranks).items())),
        norm=sum(squares.values()) ** 0.5,
        norms={component: square**0.5 for component, square in squares.items()},
        header=file.header,
    )
