"""The tensors of a LoRA file as complete pairs with every alpha folded in, before anything is known of the base."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, Final, Literal

from torch import Tensor

from hyperlora.errors import BadLoraFile
from hyperlora.lora.io.keys import COMPONENTS, KOHYA_PREFIXES, peft_key
from hyperlora.lora.layout import Site

LoraFormat = Literal["diffusers", "kohya"]
_SIDES: Final = {"lora_A.weight": "down", "lora_down.weight": "down", "lora_B.weight": "up", "lora_up.weight": "up"}
_KEY: Final = re.compile(r"(?P<stem>.+)\.(?P<side>lora_(?:A|B|down|up)\.weight|alpha)")
_LARGEST: Final = 1e9
_PLAIN_PATTERN: Final = re.compile(r"\^?[\w.]+\$?", re.ASCII)
_OTHER_KINDS: Final = {
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "LoHa": ("hada_",),
    "LoKr": ("lokr_",),
    "a CP-decomposed LoCon": ("lora_mid",),
}


@dataclass(frozen=True)
class Pair:
    """One site of a file: ``down`` [rank, in] or [rank, in, kh, kw], ``up`` [out, rank] or [out, rank, 1, 1]."""

    name: str
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def site(self) -> Site:
        kernel = (self.down.shape[2], self.down.shape[3]) if self.down.ndim == 4 else None
        return Site(self.name, self.down[0].numel(), self.up.shape[0], kernel)


def format_of(keys: Mapping[str, Tensor]) -> LoraFormat:
    """``kohya`` if the first key has one of its prefixes."""
    prefixes = tuple(prefix for group in KOHYA_PREFIXES.values() for prefix in group)
    return "kohya" if next(iter(keys)).startswith(prefixes) else "diffusers"


def folded_pairs(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name_of: Callable[[str], str], file: str
) -> dict[str, Pair]:
    """Pairs by site name (``name_of`` a stem), in float32, alpha / rank multiplied into ``up``.

    Alpha comes from ``.alpha`` tensors (kohya) or the ``lora_adapter_metadata`` header (diffusers). Raises
    ``BadLoraFile`` for unknown or duplicate keys, half pairs and shapes that do not fit each other.
    """
    kohya = format_of(tensors) == "kohya"
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, side = _stem_and_side(key, kohya, file)
        if side in sides.setdefault(stem, {}):
            raise BadLoraFile(f"{file} has two keys for {side} of {stem}, one of them {key}")
        sides[stem][side] = tensor
    config = {} if kohya else _adapter_config(metadata, file)
    pairs: dict[str, Pair] = {}
    for stem, found in sides.items():
        name = name_of(stem)
        if name in pairs:
            raise BadLoraFile(f"{file} has two LoRAs for site {name}, one of them under {stem}")
        pairs[name] = _folded(name, stem, found, config, file)
    return pairs


def _stem_and_side(key: str, kohya: bool, file: str) -> tuple[str, str]:
    for kind, marks in _OTHER_KINDS.items():
        if any(mark in key for mark in marks):
            raise BadLoraFile(f"{file} is {kind} (key {key}): only plain LoRA and LoCon are read, convert it first")
    match = _KEY.fullmatch(key if kohya else peft_key(key))
    if match is None:
        raise BadLoraFile(f"{file} has the key {key}, which belongs to no LoRA pair")
    stem, side = match["stem"], _SIDES.get(match["side"], "alpha")
    prefixes = [p for group in KOHYA_PREFIXES.values() for p in group] if kohya else [f"{c}." for c in COMPONENTS]
    if not stem.startswith(tuple(prefixes)):
        raise BadLoraFile(f"{file} has the key {key}, expected it to start with one of {', '.join(prefixes)}")
    return stem, side


def _folded(name: str, stem: str, found: Mapping[str, Tensor], config: Mapping[str, Any], file: str) -> Pair:
    down, up, alpha = found.get("down"), found.get("up"), found.get("alpha")
    if down is None or up is None:
        missing, there = ("down", sorted(found)) if down is None else ("up", sorted(found))
        raise BadLoraFile(f"{file} has {' and '.join(there)} of {stem} but no {missing}")
    shapes = f"down {list(down.shape)}, up {list(up.shape)}"
    if down.ndim != up.ndim or down.ndim not in (2, 4) or 0 in (*down.shape, *up.shape) or up[0, 0].numel() != 1:
        raise BadLoraFile(f"{stem} of {file} is {shapes}, which is no Linear or convolution LoRA")
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise BadLoraFile(f"{stem} of {file} is {shapes}: the ranks {rank} and {up.shape[1]} differ inside the pair")
    scale = _config_scale(config, name, rank, file)
    if alpha is not None:
        if alpha.numel() != 1 or config:
            raise BadLoraFile(f"alpha of {stem} of {file} is not one number given once: shape {list(alpha.shape)}")
        scale = float(alpha.item()) / rank
    return Pair(name, down.float(), up.float() * scale)


def _adapter_config(metadata: Mapping[str, str], file: str) -> dict[str, Any]:
    """diffusers' ``lora_adapter_metadata``: flat ``<component>.<field>`` of a PEFT ``LoraConfig``; {} if absent."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as error:
        raise BadLoraFile(f"{file} has a lora_adapter_metadata header that is no JSON") from error
    if not isinstance(config, dict):
        raise BadLoraFile(f"{file} has a lora_adapter_metadata header that is no table")
    if dora := [key for key, value in config.items() if key.endswith(".use_dora") and value]:
        raise BadLoraFile(f"{file} is DoRA ({dora[0]} in its header): only plain LoRA and LoCon are read")
    return config


def _config_scale(config: Mapping[str, Any], name: str, rank: int, file: str) -> float:
    """alpha / rank (alpha / √rank for rsLoRA) as PEFT computes it, patterns included; 1 without a header."""
    component, path = name.split(".", 1)
    fields = {key.split(".", 1)[1]: value for key, value in config.items() if key.startswith(f"{component}.")}
    if not fields:
        return 1.0
    declared = _patterned(fields, "rank_pattern", "r", path, file)
    if declared != rank:
        raise BadLoraFile(f"{name} of {file} has rank {rank}, its lora_adapter_metadata header says {declared:g}")
    alpha = _patterned(fields, "alpha_pattern", "lora_alpha", path, file)
    return alpha / (sqrt(rank) if fields.get("use_rslora") else rank)


def _patterned(fields: Mapping[str, Any], pattern: str, default: str, path: str, file: str) -> float:
    from peft.utils.other import get_pattern_key

    table = fields.get(pattern) or {}
    if isinstance(table, dict) and all(map(_PLAIN_PATTERN.fullmatch, table)):  # any regex could take forever
        value = table.get(get_pattern_key(table.keys(), path), fields.get(default))
        if isinstance(value, int | float) and abs(value) < _LARGEST:  # also refuses NaN, and integers beyond floats
            return float(value)
    raise BadLoraFile(f"{file} has no sound {default} and {pattern} in its lora_adapter_metadata header")
