"""Parse the tensors of a LoRA file to pairs with alpha folded in, without knowing the base."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Final

from torch import Tensor

from hyperlora.errors import InvalidLoraFileError
from hyperlora.lora.io.keys import (
    COMPONENTS,
    KOHYA_PREFIXES,
    LoraFormat,
    convert_key_to_peft,
)
from hyperlora.lora.layout import TargetModule

_FACTOR_BY_SUFFIX: Final = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
}
_KEY_PATTERN: Final = re.compile(r"(?P<stem>.+)\.(?P<side>lora_(?:A|B|down|up)\.weight|alpha)")
_MAX_CONFIG_VALUE: Final = 1e9
_PLAIN_PATTERN: Final = re.compile(r"\^?[\w.]+\$?", re.ASCII)
_UNSUPPORTED_MARKERS: Final = {
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "LoHa": ("hada_",),
    "LoKr": ("lokr_",),
    "a CP-decomposed LoCon": ("lora_mid",),
}


@dataclass(frozen=True)
class LoraFactors:
    """The factors of one target in a file.

    Attributes:
        name: The name of the target.
        down: [rank, in], or [rank, in, kh, kw] for a convolution.
        up: [out, rank], or [out, rank, 1, 1] for a convolution.
    """

    name: str
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Rank of the pair."""
        return self.down.shape[0]

    @property
    def target(self) -> TargetModule:
        """Name and shape of the adapted module."""
        kernel_size = (self.down.shape[2], self.down.shape[3]) if self.down.ndim == 4 else None
        return TargetModule(self.name, self.down[0].numel(), self.up.shape[0], kernel_size)


def detect_format(tensors: Mapping[str, Tensor]) -> LoraFormat:
    """Return ``kohya`` if the first key has one of its prefixes, else ``diffusers``."""
    prefixes = tuple(prefix for group in KOHYA_PREFIXES.values() for prefix in group)
    return "kohya" if next(iter(tensors)).startswith(prefixes) else "diffusers"


def parse_state_dict(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    name_fn: Callable[[str], str],
    file_name: str,
) -> dict[str, LoraFactors]:
    """Group the tensors of a file to pairs in float32, with alpha / rank multiplied into ``up``.

    Args:
        tensors: The tensors by key.
        metadata: The metadata of the file; its ``lora_adapter_metadata`` has the alphas of
            diffusers' files. In kohya's files they are tensors.
        name_fn: Function from the stem of a key to the name of the target.
        file_name: The name of the file in error messages.

    Returns:
        Pairs by target name.

    Raises:
        InvalidLoraFileError: Keys are unknown or duplicate, a factor is missing, or shapes do not
            fit each other.
    """
    is_kohya = detect_format(tensors) == "kohya"
    tensors_by_stem: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, role = _parse_key(key, is_kohya, file_name)
        if role in tensors_by_stem.setdefault(stem, {}):
            raise InvalidLoraFileError(
                f"{file_name} has two keys for {role} of {stem}, one of them {key}"
            )
        tensors_by_stem[stem][role] = tensor
    config = {} if is_kohya else _parse_adapter_config(metadata, file_name)
    factors_by_name: dict[str, LoraFactors] = {}
    for stem, stem_tensors in tensors_by_stem.items():
        name = name_fn(stem)
        if name in factors_by_name:
            raise InvalidLoraFileError(
                f"{file_name} has two LoRAs for target {name}, one of them under {stem}"
            )
        factors_by_name[name] = _fold_alpha(name, stem, stem_tensors, config, file_name)
    return factors_by_name


def _parse_key(key: str, is_kohya: bool, file_name: str) -> tuple[str, str]:
    """Stem of a key, and ``down``, ``up`` or ``alpha``."""
    for kind, markers in _UNSUPPORTED_MARKERS.items():
        if any(marker in key for marker in markers):
            raise InvalidLoraFileError(
                f"{file_name} is {kind} (key {key}): "
                f"only plain LoRA and LoCon are read, convert it first"
            )
    match = _KEY_PATTERN.fullmatch(key if is_kohya else convert_key_to_peft(key))
    if match is None:
        raise InvalidLoraFileError(f"{file_name} has the key {key}, which belongs to no LoRA pair")
    stem, role = match["stem"], _FACTOR_BY_SUFFIX.get(match["side"], "alpha")
    prefixes = (
        [p for group in KOHYA_PREFIXES.values() for p in group]
        if is_kohya
        else [f"{c}." for c in COMPONENTS]
    )
    if not stem.startswith(tuple(prefixes)):
        raise InvalidLoraFileError(
            f"{file_name} has the key {key}, expected it to start with one of {', '.join(prefixes)}"
        )
    return stem, role


def _fold_alpha(
    name: str,
    stem: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, object],
    file_name: str,
) -> LoraFactors:
    """The pair of one target, checked, with ``up`` scaled by alpha / rank."""
    down, up, alpha = tensors.get("down"), tensors.get("up"), tensors.get("alpha")
    if down is None or up is None:
        missing = "down" if down is None else "up"
        raise InvalidLoraFileError(
            f"{file_name} has {' and '.join(sorted(tensors))} of {stem} but no {missing}"
        )
    shapes = f"down {list(down.shape)}, up {list(up.shape)}"
    if (
        down.ndim != up.ndim
        or down.ndim not in (2, 4)
        or 0 in (*down.shape, *up.shape)
        or up[0, 0].numel() != 1
    ):
        raise InvalidLoraFileError(
            f"{stem} of {file_name} is {shapes}, which is no Linear or convolution LoRA"
        )
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise InvalidLoraFileError(
            f"{stem} of {file_name} is {shapes}: "
            f"the ranks {rank} and {up.shape[1]} differ inside the pair"
        )
    scale = _compute_scale(config, name, rank, file_name)
    if alpha is not None:
        if alpha.numel() != 1 or config:
            raise InvalidLoraFileError(
                f"alpha of {stem} of {file_name} is not one number given once: "
                f"shape {list(alpha.shape)}"
            )
        scale = float(alpha.item()) / rank
    return LoraFactors(name, down.float(), up.float() * scale)


def _parse_adapter_config(metadata: Mapping[str, str], file_name: str) -> dict[str, object]:
    """diffusers' ``lora_adapter_metadata``: fields of PEFT's ``LoraConfig``, {} if absent.

    Keys are ``<component>.<field>``.
    """
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as error:
        raise InvalidLoraFileError(
            f"{file_name} has a lora_adapter_metadata that is no JSON"
        ) from error
    if not isinstance(config, dict):
        raise InvalidLoraFileError(f"{file_name} has a lora_adapter_metadata that is no table")
    if dora := [key for key, value in config.items() if key.endswith(".use_dora") and value]:
        raise InvalidLoraFileError(
            f"{file_name} is DoRA ({dora[0]} in its metadata): only plain LoRA and LoCon are read"
        )
    return config


def _compute_scale(config: Mapping[str, object], name: str, rank: int, file_name: str) -> float:
    """alpha / rank (rsLoRA: alpha / √rank) as PEFT computes it; 1 without adapter metadata."""
    component, path = name.split(".", 1)
    fields = {
        key.split(".", 1)[1]: value
        for key, value in config.items()
        if key.startswith(f"{component}.")
    }
    if not fields:
        return 1.0
    config_rank = _resolve_pattern_value(fields, "rank_pattern", "r", path, file_name)
    if config_rank != rank:
        raise InvalidLoraFileError(
            f"{name} of {file_name} has rank {rank}, its lora_adapter_metadata says {config_rank:g}"
        )
    alpha = _resolve_pattern_value(fields, "alpha_pattern", "lora_alpha", path, file_name)
    return alpha / (sqrt(rank) if fields.get("use_rslora") else rank)


def _resolve_pattern_value(
    fields: Mapping[str, object], pattern_field: str, default_field: str, path: str, file_name: str
) -> float:
    """The value for a path: that of the pattern which matches it, else the default."""
    from peft.utils.other import get_pattern_key

    patterns = fields.get(pattern_field) or {}
    # only plain patterns: matching an arbitrary regular expression could take forever
    if isinstance(patterns, dict) and all(map(_PLAIN_PATTERN.fullmatch, patterns)):
        value = patterns.get(get_pattern_key(patterns.keys(), path), fields.get(default_field))
        # the comparison also refuses NaN, and integers that no float holds
        if isinstance(value, int | float) and abs(value) < _MAX_CONFIG_VALUE:
            return float(value)
    raise InvalidLoraFileError(
        f"{file_name} has no sound {default_field} and {pattern_field} in its lora_adapter_metadata"
    )
