"""``read_lora``: the content of a LoRA file of any tool, or an error of one sentence.

``load_lora`` is the public function; this one also checks files that ``save_lora`` is to write.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Final

from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError, LayoutMismatchError
from hyperlora.lora.factors import pad_factors
from hyperlora.lora.io.keys import LoraFormat, list_kohya_stems, parse_kohya_stem
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.safetensors_file import read_tensors
from hyperlora.lora.io.state_dict import LoraFactors, detect_format, parse_state_dict
from hyperlora.lora.layout import UNKNOWN_BASE, LoraLayout, list_layers
from hyperlora.lora.weights import LoraWeights

MAX_PARAMETERS: Final = 2 << 30
"""Numbers that a file may have after padding to its largest rank."""
_DEFAULT_LAYERS_PER_BLOCK: Final = 2


@dataclass(frozen=True)
class LoraContent:
    """Content of a LoRA file.

    Attributes:
        weights: One LoRA in float32, alpha folded in, without batch axis.
        metadata: The metadata of the file.
        format: The key names of the file.
        ranks: The rank of each target before padding, in layout order.
        size_bytes: The size of the file.
    """

    weights: LoraWeights
    metadata: LoraMetadata
    format: LoraFormat
    ranks: tuple[int, ...]
    size_bytes: int


def read_lora(
    source: str | PathLike[str] | bytes,
    layout: LoraLayout | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    max_parameters: int = MAX_PARAMETERS,
) -> LoraContent:
    """Read a ``.safetensors`` file with keys of diffusers or kohya.

    Targets of smaller rank are zero-padded to the largest. With neither ``layout`` nor ``modules``,
    targets and shapes are those of the file (CLIP text encoders under ``text_model.``), and the
    base is what the metadata says or ``UNKNOWN_BASE``.

    Args:
        source: The path of the file, or its bytes.
        layout: The file must have exactly these targets, at any rank.
        modules: The modules of the loaded base by component, e.g. ``{"unet": unet}``. The file may
            adapt any part of them and nothing else.
        max_parameters: Numbers that the LoRA may have at its largest rank; checked before padding.

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
    else:
        base = lora_metadata.base_model or UNKNOWN_BASE
        expected = _make_file_layout(factors_by_name, modules, base, file_name)
    ordered_factors = [factors_by_name[target.name] for target in expected.targets]
    base = claimed_base if layout is not None and claimed_base else expected.base
    file_layout = LoraLayout(
        tuple(factors.target for factors in ordered_factors),
        max(factors.rank for factors in ordered_factors),
        base,
    )
    expected.check_compatible(file_layout, ignore_rank=True)
    _check_size(file_layout, max_parameters, file_name)
    weights = _pad_to_rank(ordered_factors, file_layout)
    size_bytes = len(file) if isinstance(file, bytes) else file.stat().st_size
    return LoraContent(
        weights,
        lora_metadata,
        detect_format(tensors),
        tuple(factors.rank for factors in ordered_factors),
        size_bytes,
    )


def _list_target_names(
    layout: LoraLayout | None, modules: Mapping[str, nn.Module] | None
) -> frozenset[str]:
    """Target names that the file may use; empty if nothing is known of the base."""
    if layout is not None:
        return frozenset(target.name for target in layout.targets)
    return frozenset(
        f"{component}.{path}"
        for component, module in (modules or {}).items()
        for path, layer in list_layers(module)
    )


def _make_name_resolver(
    format: LoraFormat, known_names: Collection[str], modules: Mapping[str, nn.Module] | None
) -> Callable[[str], str]:
    """Function from the stem of a file key to the target's name in the base."""
    stems = {stem: name for name in known_names for stem in list_kohya_stems(name)}
    config = getattr((modules or {}).get("unet"), "config", None)
    layers_per_block = getattr(config, "layers_per_block", None)
    if not isinstance(layers_per_block, int):
        layers_per_block = _DEFAULT_LAYERS_PER_BLOCK

    def resolve_name(stem: str) -> str:
        """Convert the stem of a file key to the target's name in the base."""
        if format == "kohya":
            stem = stems.get(stem) or parse_kohya_stem(stem, layers_per_block)
        component, path = stem.split(".", 1)
        flat_path = path.removeprefix("text_model.")
        spellings = (stem, f"{component}.{flat_path}", f"{component}.text_model.{flat_path}")
        return next((spelling for spelling in spellings if spelling in known_names), stem)

    return resolve_name


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
    known_names = _list_target_names(None, modules)
    if unknown := sorted(set(names) - known_names):
        raise LayoutMismatchError(
            f"{file_name} (base {base!r}, {len(names)} targets) has {len(unknown)} targets that "
            f"this base lacks, e.g. {unknown[0]} ({len(known_names)} targets possible in "
            f"{', '.join(modules)}): use the base it was made for"
        )
    layouts = []
    for component, module in modules.items():
        paths = {
            name.removeprefix(f"{component}.") for name in names if name.startswith(f"{component}.")
        }
        if paths:
            layouts.append(LoraLayout.from_module(module, component, paths.__contains__, 1, base))
    return LoraLayout(tuple(target for layout in layouts for target in layout.targets), 1, base)


def _pad_to_rank(factors_list: list[LoraFactors], layout: LoraLayout) -> LoraWeights:
    """Factors as matrices, zero-padded to the rank of the layout."""
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for factors in factors_list:
        flat_down = factors.down.flatten(1)  # [rank, in · kh · kw]
        flat_up = factors.up.flatten(1)  # [out, rank]
        down, up = pad_factors(flat_down, flat_up, layout.rank)
        downs.append(down)
        ups.append(up)
    return LoraWeights(layout, tuple(downs), tuple(ups))
