"""Modules of transformers' LoRA files as targets, by diffusers' converters and ComfyUI's names.

A converter of diffusers gets one module, whose ``up`` holds its row numbers. What comes back says
which targets the module became, and which rows each has: a fused q, k, v is three targets.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from hyperlora.lora.io.comfyui_keys import COMFYUI_LAYERS


@dataclass(frozen=True)
class Converter:
    """What reads the LoRAs of a class of transformers.

    Attributes:
        mixin_name: The class of diffusers with ``lora_state_dict``, a parent of the pipeline.
        family: The key of ``COMFYUI_LAYERS``, for names and sizes that diffusers does not take.
    """

    mixin_name: str
    family: str


CONVERTERS: Final[Mapping[str, Converter]] = {
    "FluxTransformer2DModel": Converter("FluxLoraLoaderMixin", "FLUX.1"),
    "ChromaTransformer2DModel": Converter("FluxLoraLoaderMixin", "Chroma"),
    "Flux2Transformer2DModel": Converter("Flux2LoraLoaderMixin", "FLUX.2"),
    "QwenImageTransformer2DModel": Converter("QwenImageLoraLoaderMixin", "Qwen-Image"),
    "QwenImage21Transformer2DModel": Converter("QwenImageLoraLoaderMixin", "Qwen-Image 2.1"),
    "ZImageTransformer2DModel": Converter("ZImageLoraLoaderMixin", "Z-Image"),
    "SD3Transformer2DModel": Converter("SD3LoraLoaderMixin", "SD3"),
    "Lumina2Transformer2DModel": Converter("Lumina2LoraLoaderMixin", "Lumina 2"),
    "HiDreamImageTransformer2DModel": Converter("HiDreamImageLoraLoaderMixin", "HiDream"),
    "Krea2Transformer2DModel": Converter("Krea2LoraLoaderMixin", "Krea 2"),
}
"""Converters by the class of the transformer in diffusers."""
_FLUX_1_RATIOS: Final = {"linear1": (7, 1), "linear2": (1, 5), "mlp_0": (4, 1), "mlp_2": (1, 4)}
_WIDTH_RATIOS: Final[Mapping[str, Mapping[str, tuple[int, int]]]] = {
    "FLUX.1": _FLUX_1_RATIOS,
    "Chroma": _FLUX_1_RATIOS,
    "FLUX.2": {"linear1": (9, 1), "linear2": (1, 4), "mlp_0": (6, 1), "mlp_2": (1, 3)},
    "Z-Image": {"attention_qkv": (3, 1)},
    "Lumina 2": {"attention_qkv": (5, 3)},
}
"""Rows to columns of layers that two families give one name, by the end of the name."""


@dataclass(frozen=True)
class Piece:
    """One target that a module of a file becomes.

    Attributes:
        name: The target, or its path in the transformer.
        rows: The rows of ``up`` that it has [n], None for all.
    """

    name: str
    rows: Tensor | None = None


def convert_module(converter: Converter, path: str, num_rows: int, num_columns: int) -> list[Piece]:
    """Convert a module's name in a file to targets.

    Args:
        converter: A value of ``CONVERTERS``.
        path: The module without prefix, e.g. ``double_blocks_0_img_attn_qkv``.
        num_rows: Rows of its ``up``.
        num_columns: Columns of its ``down``.

    Returns:
        The paths of the targets, none if the module is not known.
    """
    flat_path = path.replace(".", "_")
    spellings = [
        (f"lora_unet_{flat_path}.lora_down.weight", f"lora_unet_{flat_path}.lora_up.weight"),
        (f"diffusion_model.{path}.lora_A.weight", f"diffusion_model.{path}.lora_B.weight"),
    ]
    if ".processor." in path:  # XLabs
        spellings = [(f"{path}.down.weight", f"{path}.up.weight")]
    for pattern, parts in _compile_layers(converter.family):  # some of which diffusers lets pass
        if match := pattern.fullmatch(flat_path):
            paths = [part.format(*match.groups()) for part in parts]
            return split_rows(paths, _compute_widths(paths, num_rows, num_columns))
    for down_key, up_key in spellings:
        if pieces := _ask_diffusers(converter.mixin_name, down_key, up_key, num_rows):
            return pieces
    return []


def split_rows(names: Sequence[str], widths: Sequence[int]) -> list[Piece]:
    """Split rows between targets, one after the other.

    Args:
        names: The targets.
        widths: The rows of each.

    Returns:
        The targets with their rows.
    """
    if len(names) == 1:
        return [Piece(names[0])]
    rows = torch.arange(sum(widths)).split(list(widths))
    return [Piece(name, part) for name, part in zip(names, rows, strict=True)]


def has_expected_ratio(family: str, path: str, num_rows: int, num_columns: int) -> bool:
    """Return whether a layer's shape fits a family, where another family uses the same name.

    Args:
        family: The family of a ``Converter``.
        path: The module without prefix.
        num_rows: Rows of the weight.
        num_columns: Columns of the weight.

    Returns:
        True also for layers of which nothing is known.
    """
    flat_path = path.replace(".", "_")
    for ending, (rows, columns) in _WIDTH_RATIOS.get(family, {}).items():
        if flat_path.endswith(ending):
            return num_rows * columns == num_columns * rows
    return True


def _ask_diffusers(mixin_name: str, down_key: str, up_key: str, num_rows: int) -> list[Piece]:
    """Targets and rows, from a LoRA of rank 1 whose ``up`` counts its rows; [] if not known."""
    from diffusers.loaders import lora_pipeline

    mixin: Any = getattr(lora_pipeline, mixin_name)
    row_numbers = torch.arange(num_rows, dtype=torch.float64)[:, None]  # [n, 1]
    try:
        with _silence_diffusers():
            state_dict = mixin.lora_state_dict({down_key: torch.ones(1, 1), up_key: row_numbers})
    # the converters check little: what they do not know raises anything
    except (ValueError, LookupError, AssertionError, TypeError, AttributeError, RuntimeError):
        return []
    pieces: list[Piece] = []
    for key, tensor in state_dict.items():
        if not key.endswith(".lora_B.weight"):
            continue
        if key == up_key or key.replace(".lora_B.", ".lora_A.") not in state_dict:
            return []  # not converted
        path = key.removesuffix(".lora_B.weight").removeprefix("transformer.")
        pieces.append(Piece(path, tensor[:, 0].round().long()))
    rows = [piece.rows for piece in pieces if piece.rows is not None]
    if not rows or not torch.equal(torch.cat(rows).sort().values, torch.arange(num_rows)):
        return []  # rows were dropped
    return pieces


@contextmanager
def _silence_diffusers() -> Iterator[None]:
    """Keep converters from logging keys that they do not know, since others are asked, too."""
    logger = logging.getLogger("diffusers.loaders.lora_conversion_utils")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


@cache
def _compile_layers(family: str) -> tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]:
    """ComfyUI's layers as patterns of paths without dots."""
    return tuple(
        (re.compile(layer.replace(".", "_").format(r"(\d+)")), parts)
        for layer, parts in COMFYUI_LAYERS.get(family, {}).items()
    )


def _compute_widths(paths: Sequence[str], num_rows: int, num_columns: int) -> list[int]:
    """Rows of each part of a fused layer."""
    if paths[-1].endswith(".proj_mlp"):
        return [*[num_columns] * 3, max(0, num_rows - 3 * num_columns)]
    if len(paths) == 3:
        narrow = max(0, (num_rows - num_columns) // 2)  # keys and values, fewer of grouped queries
        return [num_rows - 2 * narrow, narrow, narrow]
    width = num_rows // len(paths)
    return [*[width] * (len(paths) - 1), num_rows - width * (len(paths) - 1)]
