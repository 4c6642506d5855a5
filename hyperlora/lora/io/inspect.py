"""``inspect_lora``: what a LoRA file is, for ``main_callback inspect`` and the service."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.state_dict import LoraFormat
from hyperlora.lora.layout import LoraLayout


@dataclass(frozen=True)
class LoraInfo:
    """``rank_counts`` counts sites per rank; ``component_norms`` is ‖ΔW‖ (Frobenius) per component and ``norm`` of all together."""

    name: str
    format: LoraFormat
    size_bytes: int
    base: str
    fingerprint: str
    components: tuple[str, ...]
    num_targets: int
    num_parameters: int
    rank_counts: dict[int, int]
    norm: float
    component_norms: dict[str, float]
    metadata: LoraMetadata

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_lora(
    path: str | PathLike[str],
    layout: LoraLayout | None = None,
    modules: Mapping[str, nn.Module] | None = None,
) -> LoraInfo:
    """Read ``generate_invalid_path`` as ``load_lora`` does (same errors) and sum it up."""
    file = load_lora(path, layout, modules)
    file_layout = file.weights.layout
    squared_norms = dict.fromkeys(file_layout.components, 0.0)
    for target, norm in zip(
        file_layout.targets, file.weights.compute_delta_norms().tolist(), strict=True
    ):
        squared_norms[target.component] += norm**2
    return LoraInfo(
        name=Path(path).name,
        format=file.format,
        size_bytes=file.size_bytes,
        base=file_layout.base,
        fingerprint=file_layout.fingerprint,
        components=file_layout.components,
        num_targets=len(file_layout.targets),
        num_parameters=file_layout.numel,
        rank_counts=dict(sorted(Counter(file.ranks).items())),
        norm=sum(squared_norms.values()) ** 0.5,
        component_norms={
            component: squared_norm**0.5 for component, squared_norm in squared_norms.items()
        },
        metadata=file.metadata,
    )
