"""``read_lora``: the content of a LoRA file of any tool, or an error of one sentence.

``load_lora`` is the public function; this one also checks files that ``save_lora`` is to write.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError, LayoutMismatchError
from hyperlora.lora.factors import pad_factors
from hyperlora.lora.io.keys import COMPONENTS, LoraFormat
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.peft_folder import find_source, read_config
from hyperlora.lora.io.safetensors_file import MAX_HEADER_BYTES, read_tensors
from hyperlora.lora.io.state_dict import LoraFactors, check_keys, group_tensors, parse_adapters
from hyperlora.lora.io.target_names import TargetResolver
from hyperlora.lora.layout import UNKNOWN_BASE, LoraLayout, describe_other_layer, list_layers
from hyperlora.lora.weights import LoraWeights

MAX_PARAMETERS: Final = 2 << 30
"""Numbers that a file may have after padding to its largest rank."""
_MAX_NAMES: Final = 5
_MAX_NAME_LENGTH: Final = 80
_MISSING_ALPHA_NOTE: Final = (
    "the file is PEFT's, whose alpha stands in adapter_config.json: without it alpha is the rank"
)


@dataclass(frozen=True)
class LoraContent:
    """Content of a LoRA file.

    Attributes:
        weights: One LoRA in float32, alpha folded in, without batch axis.
        metadata: The metadata of the file.
        format: The key names of the file.
        ranks: The rank of each target before padding, in layout order.
        size_bytes: The size of the file.
        dtype: The precision of the factors in the file, float8 and float64 included.
        notes: Sentences on what was left out of the file or assumed of it, for users.
        keys: The keys of the LoRA in the file.
    """

    weights: LoraWeights
    metadata: LoraMetadata
    format: LoraFormat
    ranks: tuple[int, ...]
    size_bytes: int
    dtype: torch.dtype = torch.float32
    notes: tuple[str, ...] = ()
    keys: frozenset[str] = frozenset()


def read_lora(
    source: str | PathLike[str] | bytes,
    layout: LoraLayout | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    max_parameters: int = MAX_PARAMETERS,
    base_id: str = "",
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> LoraContent:
    """Read a LoRA file with the keys of any program, as ``load_lora`` does.

    Args:
        source: See ``load_lora``.
        layout: See ``load_lora``.
        modules: See ``load_lora``.
        max_parameters: See ``load_lora``.
        base_id: See ``load_lora``.
        max_header_bytes: See ``load_lora``.

    Returns:
        The content of the file.

    Raises:
        InvalidLoraFileError: The file cannot be trusted or understood.
        LayoutMismatchError: The file is not for this base.
        InvalidArgumentError: Both ``layout`` and ``modules`` are given.
    """
    if layout is not None and modules is not None:
        raise InvalidArgumentError(
            "pass layout (a file for exactly these targets) or modules (any part of this base), "
            "not both"
        )
    lora_source = find_source(source if isinstance(source, bytes) else Path(source))
    file_name = lora_source.name
    notes: list[str] = []

    def select_keys(keys: Collection[str]) -> Collection[str]:
        """Select the keys of the LoRA, and note the others."""
        lora_keys, other_keys = check_keys(keys, file_name)
        if not lora_keys:
            raise InvalidLoraFileError(
                f"{file_name} holds no LoRA: no key ends as those of one do, e.g. {other_keys[0]!r}"
            )
        if other_keys:
            notes.append(_describe_left_out(sorted(other_keys)))
        return lora_keys

    tensors, metadata = read_tensors(lora_source.file, file_name, select_keys, max_header_bytes)
    lora_metadata = LoraMetadata.from_safetensors_metadata(metadata)
    config, component = read_config(lora_source, metadata)
    adapters = group_tensors(tensors, file_name)
    if not config.fields and all(
        stem.startswith("base_model.model.") and "alpha" not in roles
        for stem, roles in adapters.tensors.items()
    ):
        notes.append(_MISSING_ALPHA_NOTE)
    resolver = TargetResolver(layout, modules, component)
    factors_by_name = parse_adapters(
        adapters, config, lambda shapes: resolver.resolve(shapes, file_name), max_parameters
    )
    factors_by_name = {
        name: factors.fit(resolver.targets.get(name)) for name, factors in factors_by_name.items()
    }
    claimed_base = metadata.get("hyperlora.base", "")
    if layout is not None:
        _check_same_targets(factors_by_name.keys(), layout, claimed_base, file_name)
        expected = layout
    else:
        base = lora_metadata.base_model or UNKNOWN_BASE
        expected = _make_file_layout(factors_by_name, modules, base, file_name)
        if modules is not None:  # they are the base now: files of one base add up
            expected = replace(expected, base=base_id or UNKNOWN_BASE)
    ordered_factors = [factors_by_name[target.name] for target in expected.targets]
    base = claimed_base if layout is not None and claimed_base else expected.base
    file_layout = LoraLayout(
        tuple(factors.target for factors in ordered_factors),
        max(factors.rank for factors in ordered_factors),
        base,
    )
    expected.check_compatible(file_layout, ignore_rank=True)
    _check_size(file_layout, max_parameters, file_name)
    return LoraContent(
        # what comes from a path is mapped memory, which changes with the file: copied
        weights=_pad_to_rank(ordered_factors, file_layout, copy=isinstance(lora_source.file, Path)),
        metadata=lora_metadata,
        format=adapters.detect_format(file_layout.components),
        ranks=tuple(factors.rank for factors in ordered_factors),
        size_bytes=lora_source.size_bytes,
        dtype=_find_dtype(tensors),
        notes=tuple(notes),
        keys=frozenset(tensors),
    )


def _describe_left_out(keys: Sequence[str]) -> str:
    """Name the keys that belong to no LoRA."""
    names = ", ".join(repr(key[:_MAX_NAME_LENGTH]) for key in keys[:_MAX_NAMES])
    more = f" and {len(keys) - _MAX_NAMES} more" if len(keys) > _MAX_NAMES else ""
    count = "1 key that belongs" if len(keys) == 1 else f"{len(keys)} keys that belong"
    return f"left out {count} to no LoRA: {names}{more}"


def _find_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of all factors, float32 if they have several."""
    dtypes = {tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha")}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _check_same_targets(
    names: Collection[str], layout: LoraLayout, claimed_base: str, file_name: str
) -> None:
    """Raise ``LayoutMismatchError`` unless the file has exactly the targets of the layout."""
    expected = {target.name for target in layout.targets}
    missing, unknown = expected - set(names), set(names) - expected
    if not missing and not unknown:
        return
    source = f"base {claimed_base!r}" if claimed_base else "an unnamed base"
    num_covered = len(expected) - len(missing)
    raise LayoutMismatchError(
        f"{file_name} ({source}, {len(names)} targets) has {num_covered} of the {len(expected)} "
        f"targets expected for base {layout.base!r} and {len(unknown)} others, e.g. "
        f"{min(unknown or missing)}: use a LoRA made for this layout"
    )


def _check_size(layout: LoraLayout, max_parameters: int, file_name: str) -> None:
    """Raise ``InvalidLoraFileError`` for more numbers than allowed."""
    if layout.numel > max_parameters:
        raise InvalidLoraFileError(
            f"{file_name} would unfold to {layout.numel:,} numbers at rank {layout.rank}: too many"
        )


def _make_file_layout(
    factors_by_name: Mapping[str, LoraFactors],
    modules: Mapping[str, nn.Module] | None,
    base: str,
    file_name: str,
) -> LoraLayout:
    """The layout of the file's targets: as the modules of the base have them, or as the file."""
    if modules is not None:
        return _select_layout(modules, factors_by_name.keys(), base, file_name)
    return LoraLayout(tuple(factors.target for factors in factors_by_name.values()), 1, base)


def _select_layout(
    modules: Mapping[str, nn.Module], names: Collection[str], base: str, file_name: str
) -> LoraLayout:
    """The layout of the named modules of the loaded base, in its order and with its shapes."""
    known_names = {
        f"{component}.{path}"
        for component, module in modules.items()
        for path, _ in list_layers(module)
    }
    if unknown := sorted(set(names) - known_names):
        if sentence := describe_other_layer(modules, unknown[0]):
            raise LayoutMismatchError(f"{file_name} cannot be used: {sentence}")
        components = dict.fromkeys(name.split(".", 1)[0] for name in unknown)
        missing = [name for name in components if name in COMPONENTS and name not in modules]
        hint = (
            f"give {', '.join(missing)} of the base, too, or use the base it was made for"
            if missing
            else "use the base it was made for"
        )
        raise LayoutMismatchError(
            f"{file_name} (base {base!r}, {len(names)} targets) has {len(unknown)} targets that "
            f"this base lacks, e.g. {unknown[0]} ({len(known_names)} targets possible in "
            f"{', '.join(modules)}): {hint}"
        )
    layouts = []
    for component, module in modules.items():
        paths = {
            name.removeprefix(f"{component}.") for name in names if name.startswith(f"{component}.")
        }
        if paths:
            layouts.append(LoraLayout.from_module(module, component, paths.__contains__, 1, base))
    return LoraLayout(tuple(target for layout in layouts for target in layout.targets), 1, base)


def _pad_to_rank(factors_list: list[LoraFactors], layout: LoraLayout, *, copy: bool) -> LoraWeights:
    """Factors as matrices, zero-padded to the rank of the layout; copied where they need none."""
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for factors in factors_list:
        flat_down = factors.down.flatten(1)  # [rank, in · kh · kw]
        flat_up = factors.up.flatten(1)  # [out, rank]
        down, up = flat_down, flat_up
        if copy or factors.rank < layout.rank:
            down, up = pad_factors(flat_down, flat_up, layout.rank)
        downs.append(down)
        ups.append(up)
    return LoraWeights(layout, tuple(downs), tuple(ups))
