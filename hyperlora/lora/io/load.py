"""``load_lora``: a LoRA file of any tool into ``LoraWeights``, or one sentence why not."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Final

from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.errors import BadLoraFile, BadRequest, LayoutMismatch
from hyperlora.lora.io.keys import kohya_stems, site_name_of_kohya
from hyperlora.lora.io.metadata import LoraHeader
from hyperlora.lora.io.safetensors_file import read_tensors
from hyperlora.lora.io.state_dict import LoraFormat, Pair, folded_pairs, format_of
from hyperlora.lora.layout import UNKNOWN_BASE, LoraLayout
from hyperlora.lora.weights import LoraWeights

MAX_NUMBERS: Final = 2 << 30


@dataclass(frozen=True)
class LoraFile:
    """What a file held: ``weights`` (float32, alpha folded, no batch axis), ``header``, ``format`` of its keys, the
    rank of each site before padding (layout order), and its size in bytes."""

    weights: LoraWeights
    header: LoraHeader
    format: LoraFormat
    ranks: tuple[int, ...]
    size: int


def load_lora(
    source: str | PathLike[str] | bytes,
    layout: LoraLayout | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    max_numbers: int = MAX_NUMBERS,
) -> LoraFile:
    """Read a diffusers- or kohya-keyed ``.safetensors`` file, or its bytes; sites of smaller rank are zero-padded to
    the largest.

    With ``layout``, the file must cover exactly its sites (at any rank). With ``modules`` (``{"unet": unet, ...}``), it
    may cover any part of the live base but nothing outside it. With neither, sites and shapes are the file's own, CLIP
    text encoders under ``text_model.``, and the base is what the header claims or ``"unknown"``. A file that would
    unfold to more than ``max_numbers`` (all sites at the largest rank) is refused before it does.

    Raises ``BadLoraFile`` for a file that cannot be trusted or understood, ``LayoutMismatch`` if it is not for this
    base.
    """
    if layout is not None and modules is not None:
        raise BadRequest("pass layout (a file for exactly these sites) or modules (any part of this base), not both")
    file = source if isinstance(source, bytes) else Path(source)
    name = "the LoRA" if isinstance(file, bytes) else file.name
    tensors, metadata = read_tensors(file, name)
    header = LoraHeader.from_metadata(metadata)
    known = _known_names(layout, modules)
    pairs = folded_pairs(tensors, metadata, _namer(format_of(tensors), known, modules), name)
    claimed = metadata.get("hyperlora.base", "")
    if layout is not None:
        _require_same_sites(pairs.keys(), layout, claimed, name)
        expected = layout
    elif modules is not None:
        expected = _part_of(modules, pairs.keys(), header.base_model or UNKNOWN_BASE, name)
    else:
        base = header.base_model or UNKNOWN_BASE
        expected = LoraLayout(tuple(pair.site for pair in pairs.values()), 1, base)
    ordered = [pairs[site.name] for site in expected.sites]
    base = claimed if layout is not None and claimed else expected.base
    found = LoraLayout(tuple(pair.site for pair in ordered), max(pair.rank for pair in ordered), base)
    expected.require(found, any_rank=True)
    if found.numel > max_numbers:
        raise BadLoraFile(f"{name} would unfold to {found.numel:,} numbers at rank {found.rank}: too many")
    weights = _padded(ordered, found)
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    return LoraFile(weights, header, format_of(tensors), tuple(p.rank for p in ordered), size)


def _known_names(layout: LoraLayout | None, modules: Mapping[str, nn.Module] | None) -> frozenset[str]:
    """Site names the file may use; empty if nothing is known of the base."""
    if layout is not None:
        return frozenset(site.name for site in layout.sites)
    return frozenset(
        f"{component}.{path}"
        for component, module in (modules or {}).items()
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    )


def _namer(format: LoraFormat, known: Collection[str], modules: Mapping[str, nn.Module] | None) -> Callable[[str], str]:
    """Stem of a file key -> site name as the base spells it."""
    stems = {stem: name for name in known for stem in kohya_stems(name)}
    config = getattr((modules or {}).get("unet"), "config", None)
    per_block = getattr(config, "layers_per_block", 2)

    def name_of(stem: str) -> str:
        if format == "kohya":
            stem = stems.get(stem) or site_name_of_kohya(stem, per_block if isinstance(per_block, int) else 2)
        component, path = stem.split(".", 1)
        flat = path.removeprefix("text_model.")
        spellings = (stem, f"{component}.{flat}", f"{component}.text_model.{flat}")
        return next((spelling for spelling in spellings if spelling in known), stem)

    return name_of


def _require_same_sites(found: Collection[str], layout: LoraLayout, claimed: str, file: str) -> None:
    expected = {site.name for site in layout.sites}
    missing, unknown = expected - set(found), set(found) - expected
    if not missing and not unknown:
        return
    source = f"base {claimed!r}" if claimed else "an unnamed base"
    matching = f"{len(expected) - len(missing)} of the {len(expected)} sites expected for base {layout.base!r}"
    raise LayoutMismatch(
        f"{file} ({source}, {len(found)} sites) has {matching} and {len(unknown)} others, "
        f"e.g. {min(unknown or missing)}: use a LoRA made for this layout"
    )


def _part_of(modules: Mapping[str, nn.Module], names: Collection[str], base: str, file: str) -> LoraLayout:
    """The layout of the sites ``names`` of the live base, in its own order; shapes are the base's."""
    known = _known_names(None, modules)
    if unknown := sorted(set(names) - known):
        raise LayoutMismatch(
            f"{file} (base {base!r}, {len(names)} sites) has {len(unknown)} sites that this base lacks, e.g. "
            f"{unknown[0]} ({len(known)} sites possible in {', '.join(modules)}): use the base it was made for"
        )
    layouts = [
        LoraLayout.of(module, component, lambda path, c=component: f"{c}.{path}" in names, 1, base)  # type: ignore[misc]
        for component, module in modules.items()
        if any(name.startswith(f"{component}.") for name in names)
    ]
    return LoraLayout(tuple(site for part in layouts for site in part.sites), 1, base)


def _padded(pairs: list[Pair], layout: LoraLayout) -> LoraWeights:
    down: list[Tensor] = []
    up: list[Tensor] = []
    for pair in pairs:
        missing = layout.rank - pair.rank
        down.append(F.pad(pair.down.flatten(1), (0, 0, 0, missing)))
        up.append(F.pad(pair.up.flatten(1), (0, missing)))
    return LoraWeights(layout, tuple(down), tuple(up))
