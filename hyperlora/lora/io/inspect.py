"""``inspect_lora``: a summary of a LoRA file, for ``hyperlora inspect`` and the service."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Final

from torch import nn

from hyperlora.lora.io.formats import detect_family, list_readers
from hyperlora.lora.io.keys import LoraFormat
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.written_keys import has_written_keys
from hyperlora.lora.layout import UNKNOWN_BASE, LoraLayout

_UNKNOWN_READERS_NOTE: Final = (
    "its keys are of another spelling, whose readers are not known: "
    "hyperlora convert writes keys that programs are known to read"
)


@dataclass(frozen=True)
class LoraInfo:
    """Summary of a LoRA file.

    Attributes:
        name: The file name.
        format: The key names of the file.
        readers: Programs that read the file whole, by ``formats.READERS``; none where its keys
            are not those of the format.
        size_bytes: The size of the file.
        base: The id of the base model that the file names, ``UNKNOWN_BASE`` if it names none.
        fingerprint: The fingerprint of the layout.
        components: Components of the base model that the LoRA adapts.
        num_targets: Number of adapted modules.
        num_parameters: Numbers of the LoRA at its largest rank.
        rank_counts: Number of targets per rank, before padding.
        norm: Frobenius norm of ΔW over all targets.
        component_norms: The same per component.
        dtype: The precision of the file.
        notes: What was left out of the file or assumed of it.
        metadata: The metadata of the file.
    """

    name: str
    format: LoraFormat
    readers: tuple[str, ...]
    size_bytes: int
    base: str
    fingerprint: str
    components: tuple[str, ...]
    num_targets: int
    num_parameters: int
    rank_counts: dict[int, int]
    norm: float
    component_norms: dict[str, float]
    dtype: str
    notes: tuple[str, ...]
    metadata: LoraMetadata

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary for JSON."""
        return asdict(self)


def inspect_lora(
    path: str | PathLike[str],
    layout: LoraLayout | None = None,
    modules: Mapping[str, nn.Module] | None = None,
) -> LoraInfo:
    """Read and summarize a LoRA file.

    Args:
        path: The ``.safetensors`` file.
        layout: See ``load_lora``.
        modules: See ``load_lora``.

    Returns:
        The summary.

    Raises:
        InvalidLoraFileError: The file cannot be trusted or understood.
        LayoutMismatchError: The file is not for this base.
    """
    file = load_lora(path, layout, modules)
    file_layout = file.weights.layout
    squared_norms = dict.fromkeys(file_layout.components, 0.0)
    for target, norm in zip(
        file_layout.targets, file.weights.compute_delta_norms().tolist(), strict=True
    ):
        squared_norms[target.component] += norm**2
    architecture, notes = file.metadata.architecture, file.notes
    readers = list_readers(file_layout, file.format, architecture)
    family = detect_family(file_layout, architecture)
    if not has_written_keys(file.keys, file.weights, file.format, family):
        readers, notes = (), (*notes, _UNKNOWN_READERS_NOTE)
    return LoraInfo(
        name=Path(path).name,
        format=file.format,
        readers=readers,
        size_bytes=file.size_bytes,
        base=file.metadata.base_model or UNKNOWN_BASE,
        fingerprint=replace(file_layout, base=file.metadata.base_model or UNKNOWN_BASE).fingerprint,
        components=file_layout.components,
        num_targets=len(file_layout.targets),
        num_parameters=file_layout.numel,
        rank_counts=dict(sorted(Counter(file.ranks).items())),
        norm=sum(squared_norms.values()) ** 0.5,
        component_norms={
            component: squared_norm**0.5 for component, squared_norm in squared_norms.items()
        },
        dtype=str(file.dtype).removeprefix("torch."),
        notes=notes,
        metadata=file.metadata,
    )
