"""From the stems of a file to targets: by the modules of the base, else by what names tell."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from torch import nn

from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError
from hyperlora.lora.io.converters import (
    CONVERTERS,
    Converter,
    Piece,
    convert_module,
    has_expected_ratio,
    split_rows,
)
from hyperlora.lora.io.keys import convert_path_to_sgm, parse_kohya_stem
from hyperlora.lora.io.module_names import DENOISER_SIZES, ModuleNames
from hyperlora.lora.io.spellings import StemParts, split_stem
from hyperlora.lora.layout import (
    LoraLayout,
    TargetModule,
    get_base_layer,
    list_layers,
    make_target,
    unwrap_module,
)

_TRANSFORMERS: Final = ("transformer", "transformer_2")
_DEFAULT_LAYERS_PER_BLOCK: Final = 2
_ORIGINAL_ROOTS: Final = re.compile(r"(?:double|single|joint)_blocks(?:\.|_)")
"""Roots of the original FLUX and SD3, which diffusers' transformers never have."""
_UNET_PATH: Final = re.compile(
    r"(?:(?:down|up)_blocks\.\d|mid_block|conv_(?:in|out)|(?:time|add)_embedding)(?:\.|$)"
)
_EMBEDDING_PATH: Final = re.compile(r"(add|time)_embedding_linear_([12])")
"""Embeddings of UNets without dots; diffusers' converter loses the first."""
_CLIP_PATH: Final = re.compile(r"(?:text_model|text_projection|encoder\.layers)(?:\.|_|$)")
_T5_PATH: Final = re.compile(
    r"encoder_block_(\d+)_layer_(\d+)_(SelfAttention|DenseReluDense)_(q|k|v|o|wi_0|wi_1|wi|wo)"
)
_KOHYA_PREFIXES: Final[Mapping[str, str]] = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
}


@dataclass(frozen=True)
class StemShape:
    """A module of a file, and the shape of its ΔW.

    Attributes:
        stem: The key without its suffix.
        num_rows: Rows of ΔW.
        num_columns: Columns of ΔW; for a convolution, input channels times kernel area.
    """

    stem: str
    num_rows: int
    num_columns: int


class TargetResolver:
    """Finds the targets that the modules of a file are.

    Args:
        layout: The layout that the file must have; None if not known.
        modules: The modules of the base by component; None if not known.
        component: Component of stems without prefix; None if not known.
    """

    def __init__(
        self,
        layout: LoraLayout | None,
        modules: Mapping[str, nn.Module] | None,
        component: str | None = None,
    ) -> None:
        self.modules = modules
        self.component = component
        self.targets: dict[str, TargetModule] = {}
        if layout is not None:
            self.targets = {target.name: target for target in layout.targets}
        for name, module in (modules or {}).items():
            for path, layer in list_layers(module):
                target = make_target(f"{name}.{path}", get_base_layer(layer))
                self.targets[target.name] = target
        self.is_base_known = layout is not None or modules is not None

    @cached_property
    def _names(self) -> ModuleNames:
        return ModuleNames.from_names(self.targets)

    @cached_property
    def _sgm_paths(self) -> dict[str, str]:
        """Paths of the UNet by Stability's names without dots."""
        paths: dict[str, str] = {}
        for name in self.targets:
            component, path = name.split(".", 1)
            if component == "unet":
                try:
                    paths[convert_path_to_sgm(path).replace(".", "_")] = path
                except (InvalidArgumentError, KeyError, ValueError):
                    continue  # a module that SDXL lacks
        for name in self.targets:
            # upsamplers follow a resnet alone in blocks without attention, as in SD 1's first
            if match := re.fullmatch(r"unet\.(up_blocks\.(\d+)\.upsamplers\.0\.conv)", name):
                for position in (1, 2):
                    key = f"output_blocks_{2 + 3 * int(match[2])}_{position}_conv"
                    paths.setdefault(key, match[1])
        return paths

    @cached_property
    def _converters(self) -> tuple[Converter, ...]:
        """Converters of the base's transformer; all of them if its class is not known."""
        if not any(component in _TRANSFORMERS for component in self._names.paths):
            return ()
        if self.modules is None:
            return tuple(CONVERTERS.values())
        class_names = {
            type(unwrap_module(module)).__name__
            for name, module in self.modules.items()
            if name in _TRANSFORMERS
        }
        return tuple(CONVERTERS[name] for name in class_names if name in CONVERTERS)

    @cached_property
    def _layers_per_block(self) -> int:
        unet = (self.modules or {}).get("unet")
        config = getattr(unwrap_module(unet), "config", None) if unet is not None else None
        number = getattr(config, "layers_per_block", None)
        return number if isinstance(number, int) else _DEFAULT_LAYERS_PER_BLOCK

    def resolve(self, shapes: Iterable[StemShape], file_name: str) -> dict[str, list[Piece]]:
        """Find the targets of all modules of a file.

        Args:
            shapes: The modules.
            file_name: The name of the file in error messages.

        Returns:
            The targets of each stem: several where the file has them fused. With a base, a name
            may be none of its modules.

        Raises:
            InvalidLoraFileError: Without a base, a stem names no module of a known family, or
                families disagree on what it names.
        """
        pieces_by_stem: dict[str, list[Piece]] = {}
        unknown_shapes: list[StemShape] = []
        for shape in shapes:
            parts = split_stem(shape.stem)
            if not parts.components and self.component:
                parts = StemParts((self.component,), parts.path, is_exact=False)
            if self.is_base_known:
                pieces_by_stem[shape.stem] = self._resolve_on_base(parts, shape)
            elif name := self._guess_name(parts):
                pieces_by_stem[shape.stem] = [Piece(name)]
            else:
                unknown_shapes.append(shape)
        if unknown_shapes:
            pieces_by_stem |= _convert_without_base(unknown_shapes, file_name)
        return pieces_by_stem

    # ---- with a base ----

    def _resolve_on_base(self, parts: StemParts, shape: StemShape) -> list[Piece]:
        """The targets of the base that a stem means, else one name that the base lacks."""
        if names := self._names.find(parts.components, parts.path):
            return [Piece(self._select_by_shape(names, shape))]
        if not parts.components or set(parts.components) & set(_TRANSFORMERS):
            for converter in self._converters:
                if pieces := self._convert_on_base(converter, parts.path, shape):
                    return pieces
        name = self._parse_unet_or_clip_path(parts)
        if name and (names := self._names.find((name.split(".")[0],), name.split(".", 1)[1])):
            return [Piece(names[0])]
        if name:
            return [Piece(name)]
        components = parts.components or ("unknown",)
        component = next((c for c in components if c in (self.modules or {})), components[0])
        return [Piece(f"{component}.{parts.path}")]

    def _select_by_shape(self, names: list[str], shape: StemShape) -> str:
        """The name whose module has the shape of the LoRA, else the first."""
        size = (shape.num_columns, shape.num_rows)
        targets = [self.targets[name] for name in names]
        return next((t.name for t in targets if (t.in_features, t.out_features) == size), names[0])

    def _convert_on_base(self, converter: Converter, path: str, shape: StemShape) -> list[Piece]:
        """The targets that a converter makes of a path, if the base has any of them."""
        pieces = convert_module(converter, path, shape.num_rows, shape.num_columns)
        found_names = [self._names.find(_TRANSFORMERS, piece.name) for piece in pieces]
        if not any(found_names):
            return []
        names = [
            found[0] if found else f"transformer.{piece.name}"
            for found, piece in zip(found_names, pieces, strict=True)
        ]
        if len(pieces) > 1 and all(name in self.targets for name in names):
            widths = [self.targets[name].out_features for name in names]
            if sum(widths) == shape.num_rows:  # else converters assume those of the released model
                return split_rows(names, widths)
        return [Piece(name, piece.rows) for name, piece in zip(names, pieces, strict=True)]

    def _parse_unet_or_clip_path(self, parts: StemParts) -> str | None:
        """The module of a UNet or CLIP in kohya's or Stability's spelling, None for any other."""
        flat_path = parts.path.replace(".", "_")
        component = next(iter(parts.components), "unet")
        if component == "unet" and _CLIP_PATH.match(parts.path):
            component = "text_encoder"
        if component == "unet" and (match := _EMBEDDING_PATH.fullmatch(flat_path)):
            return f"unet.{match[1]}_embedding.linear_{match[2]}"
        if component == "unet" and flat_path in self._sgm_paths:
            return f"unet.{self._sgm_paths[flat_path]}"
        if component not in _KOHYA_PREFIXES:
            return None
        try:
            return parse_kohya_stem(_KOHYA_PREFIXES[component] + flat_path, self._layers_per_block)
        except InvalidLoraFileError:
            return None

    # ---- without ----

    def _guess_name(self, parts: StemParts) -> str | None:
        """The target that a stem names in every family alike, or None."""
        components, path = parts.components, parts.path
        is_original = bool(_ORIGINAL_ROOTS.match(path))
        if parts.is_exact and not is_original:
            return f"{components[0]}.{path}"
        if "." in path or not components:
            if _UNET_PATH.match(path) and (not components or "unet" in components):
                return f"unet.{path}"
            if _CLIP_PATH.match(path) and "." in path:
                text_encoders = [c for c in components if c.startswith("text_encoder")]
                return f"{(*text_encoders, 'text_encoder')[0]}.{path}"
        if components and components[0].startswith("text_encoder"):
            if match := _T5_PATH.fullmatch(path):
                block, layer, kind, weight = match.groups()
                return f"{components[0]}.encoder.block.{block}.layer.{layer}.{kind}.{weight}"
            return self._parse_unet_or_clip_path(parts) or f"{components[0]}.{path}"
        if name := self._parse_unet_or_clip_path(parts):
            return name
        names = [] if is_original else _make_templates().find((), path)
        return names[0] if names else None


def _make_templates() -> ModuleNames:
    return ModuleNames.from_denoiser_classes(tuple(DENOISER_SIZES))


def _convert_without_base(shapes: list[StemShape], file_name: str) -> dict[str, list[Piece]]:
    """The targets that every family makes of the names, if it knows all of them."""
    results: dict[tuple[str, ...], dict[str, list[Piece]]] = {}
    families: list[str] = []
    for class_name, converter in CONVERTERS.items():
        pieces_by_stem: dict[str, list[Piece]] = {}
        for shape in shapes:
            pieces = _convert_by_class(class_name, converter, shape)
            if not pieces:
                break
            pieces_by_stem[shape.stem] = pieces
        else:
            names = tuple(piece.name for pieces in pieces_by_stem.values() for piece in pieces)
            if names not in results:
                results[names] = pieces_by_stem
                families.append(converter.family)
    if len(results) == 1:
        return next(iter(results.values()))
    if results:
        raise InvalidLoraFileError(
            f"{file_name} can be a LoRA of {' or '.join(families)}, which understand "
            f"{shapes[0].stem} differently: use it on its base, whose modules decide"
        )
    raise InvalidLoraFileError(
        f"{file_name} has a LoRA under {shapes[0].stem}, which names no module of a known base: "
        "expected keys of Stable Diffusion 1 to 3, SDXL, "
        f"{', '.join(c.family for c in CONVERTERS.values() if c.family != 'SD3')}"
    )


def _convert_by_class(class_name: str, converter: Converter, shape: StemShape) -> list[Piece]:
    """The targets that one class of transformers has for a stem."""
    parts = split_stem(shape.stem)
    if parts.components and not set(parts.components) & set(_TRANSFORMERS):
        return []
    if not has_expected_ratio(converter.family, parts.path, shape.num_rows, shape.num_columns):
        return []
    templates = ModuleNames.from_denoiser_classes((class_name,))
    pieces: list[Piece] = []
    for piece in convert_module(converter, parts.path, shape.num_rows, shape.num_columns):
        names = templates.find((), piece.name)
        if not names:
            return []
        pieces.append(Piece(names[0], piece.rows))
    return pieces
