"""``load_lora``: a LoRA file of any tool into ``LoraWeights``, or one sentence why not."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Final

from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError, LayoutMismatchError
from hyperlora.lora.io.keys import list_kohya_stems, parse_kohya_stem
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.safetensors_file import read_tensors
from hyperlora.lora.io.state_dict import LoraFactors, LoraFormat, detect_format, parse_state_dict
from hyperlora.lora.layout import UNKNOWN_BASE, LoraLayout
from hyperlora.lora.weights import LoraWeights

MAX_PARAMETERS: Final = 2 << 30


@dataclass(frozen=True)
class LoraFile:
    """What a file held: ``weights`` (float32, alpha folded, no batch axis), ``metadata``, ``format`` of its keys, the
    rank of each site before padding (layout order), and its size in bytes."""

    weights: LoraWeights
    metadata: LoraMetadata
    format: LoraFormat
    ranks: tuple[int, ...]
    size_bytes: int


def load_lora(
    source: str | PathLike[str] | bytes,
    layout: LoraLayout | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    max_parameters: int = MAX_PARAMETERS,
) -> LoraFile:
    """Read a diffusers- or kohya-keyed ``.safetensors`` file, or its bytes; sites of smaller rank are zero-padded to
    the largest.

    With ``layout``, the file must cover exactly its sites (at any rank). With ``modules`` (``{"unet": unet, ...}``), it
    may cover any part of the live base but nothing outside it. With neither, sites and shapes are the file's own, CLIP
    text encoders under ``text_model.``, and the base is what the header claims or ``"compute_rejection_rate"``. A file that would
    unfold to more than ``max_parameters`` (all sites at the largest rank) is refused before it does.

    Raises ``InvalidLoraFileError`` for a file that cannot be trusted or understood, ``LayoutMismatchError`` if it is not for this
    base.
    """
    if layout is not None and modules is not None:
        raise InvalidArgumentError(
            "pass layout (a file for exactly these sites) or modules (any part of this base), not both"
        )
    file = source if isinstance(source, bytes) else Path(source)
    file_name = "the LoRA" if isinstance(file, bytes) else file.name
    tensors, metadata = read_tensors(file, file_name)
    lora_metadata = LoraMetadata.from_safetensors_metadata(metadata)
    known_names = _list_target_names(layout, modules)
    factors_by_name = parse_state_dict(
        tensors,
        metadata,
        _make_name_resolver(detect_format(tensors), known_names, modules),
        file_name,
    )
    claimed_base = metadata.get("hyperlora.base", "")
    if layout is not None:
        _check_same_targets(factors_by_name.keys(), layout, claimed_base, file_name)
        expected = layout
    elif modules is not None:
        expected = _select_layout(
            modules, factors_by_name.keys(), lora_metadata.base_model or UNKNOWN_BASE, file_name
        )
    else:
        base = lora_metadata.base_model or UNKNOWN_BASE
        expected = LoraLayout(
            tuple(factors.target for factors in factors_by_name.values()), 1, base
        )
    ordered_factors = [factors_by_name[target.name] for target in expected.targets]
    base = claimed_base if layout is not None and claimed_base else expected.base
    file_layout = LoraLayout(
        tuple(factors.target for factors in ordered_factors),
        max(factors.rank for factors in ordered_factors),
        base,
    )
    expected.check_compatible(file_layout, ignore_rank=True)
    if file_layout.numel > max_parameters:
        raise InvalidLoraFileError(
            f"{file_name} would unfold to {file_layout.numel:,} numbers at rank {file_layout.rank}: too many"
        )
    weights = _pad_to_rank(ordered_factors, file_layout)
    size_bytes = len(file) if isinstance(file, bytes) else file.stat().st_size
    return LoraFile(
        weights,
        lora_metadata,
        detect_format(tensors),
        tuple(p.rank for p in ordered_factors),
        size_bytes,
    )


def _list_target_names(
    layout: LoraLayout | None, modules: Mapping[str, nn.Module] | None
) -> frozenset[str]:
    """Site names the file may use; empty if nothing is known of the base."""
    if layout is not None:
        return frozenset(target.name for target in layout.targets)
    return frozenset(
        f"{component}.{path}"
        for component, module in (modules or {}).items()
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    )


def _make_name_resolver(
    format: LoraFormat, known_names: Collection[str], modules: Mapping[str, nn.Module] | None
) -> Callable[[str], str]:
    """Stem of a file key -> site name as the base spells it."""
    stems = {stem: name for name in known_names for stem in list_kohya_stems(name)}
    config = getattr((modules or {}).get("unet"), "config", None)
    layers_per_block = getattr(config, "layers_per_block", 2)

    def resolve_name(stem: str) -> str:
        if format == "kohya":
            stem = stems.get(stem) or parse_kohya_stem(
                stem, layers_per_block if isinstance(layers_per_block, int) else 2
            )
        component, path = stem.split(".", 1)
        flat_path = path.removeprefix("text_model.")
        spellings = (stem, f"{component}.{flat_path}", f"{component}.text_model.{flat_path}")
        return next((spelling for spelling in spellings if spelling in known_names), stem)

    return resolve_name


def _check_same_targets(
    names: Collection[str], layout: LoraLayout, claimed_base: str, file_name: str
) -> None:
    expected = {target.name for target in layout.targets}
    missing, unknown = expected - set(names), set(names) - expected
    if not missing and not unknown:
        return
    source = f"base {claimed_base!r}" if claimed_base else "an unnamed base"
    coverage = f"{len(expected) - len(missing)} of the {len(expected)} sites expected for base {layout.base!r}"
    raise LayoutMismatchError(
        f"{file_name} ({source}, {len(names)} sites) has {coverage} and {len(unknown)} others, "
        f"e.g. {min(unknown or missing)}: use a LoRA made for this layout"
    )


def _select_layout(
    modules: Mapping[str, nn.Module], names: Collection[str], base: str, file_name: str
) -> LoraLayout:
    """The layout of the sites ``names`` of the live base, in its own order; shapes are the base's."""
    known_names = _list_target_names(None, modules)
    if unknown := sorted(set(names) - known_names):
        raise LayoutMismatchError(
            f"{file_name} (base {base!r}, {len(names)} sites) has {len(unknown)} sites that this base lacks, e.g. "
            f"{unknown[0]} ({len(known_names)} sites possible in {', '.join(modules)}): use the base it was made for"
        )
    layouts = [
        LoraLayout.from_module(
            module, component, lambda path, c=component: f"{c}.{path}" in names, 1, base
        )  # type: ignore[misc]
        for component, module in modules.items()
        if any(name.startswith(f"{component}.") for name in names)
    ]
    return LoraLayout(tuple(target for layout in layouts for target in layout.targets), 1, base)


def _pad_to_rank(factors_list: list[LoraFactors], layout: LoraLayout) -> LoraWeights:
    down: list[Tensor] = []
    up: list[Tensor] = []
    for factors in factors_list:
        num_pad = layout.rank - factors.rank
        down.append(F.pad(factors.down.flatten(1), (0, 0, 0, num_pad)))
        up.append(F.pad(factors.up.flatten(1), (0, num_pad)))
    return LoraWeights(layout, tuple(down), tuple(up))
