"""``has_written_keys``: whether the keys of a file are those that ``save_lora`` writes.

Of these alone ``READERS`` says which programs read them. ``load_lora`` reads many others.
"""

import re
from collections.abc import Collection
from typing import Final

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.comfyui_keys import COMFYUI_LAYERS, fuse_factors
from hyperlora.lora.io.keys import LoraFormat, format_file_key
from hyperlora.lora.weights import LoraWeights

_KOHYA_KEY: Final = re.compile(
    r"lora_(?:unet|te|te1|te2)_\w+\.(?:lora_(?:down|up)\.weight|alpha)", re.ASCII
)
_FACTOR_SUFFIXES: Final = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
)


def has_written_keys(
    keys: Collection[str], weights: LoraWeights, format: LoraFormat, family: str
) -> bool:
    """Check that keys are spelled as in the files that ``save_lora`` writes.

    Args:
        keys: The keys of a LoRA file, without those that belong to no LoRA.
        weights: The LoRA in the file.
        format: Its format.
        family: A key of ``READERS``; empty for unknown.

    Returns:
        Whether they are.
    """
    if format in ("kohya", "sgm"):
        return all(map(_KOHYA_KEY.fullmatch, keys))
    stems = {format_file_key(target.name) for target in weights.layout.targets}
    if format == "diffusers":
        return set(keys) == {f"{stem}{suffix}" for stem in stems for suffix in _FACTOR_SUFFIXES[0]}
    if family not in COMFYUI_LAYERS:
        return False
    factors_by_name = {
        format_file_key(target.name): (down, up)
        for target, down, up in zip(weights.layout.targets, weights.down, weights.up, strict=True)
    }
    try:
        stems = set(fuse_factors(factors_by_name, family))
    except InvalidArgumentError:  # a layer that ComfyUI lacks
        return False
    factor_keys = {key for key in keys if not key.endswith(".alpha")}
    return any(
        factor_keys == {f"{stem}{suffix}" for stem in stems for suffix in suffixes}
        for suffixes in _FACTOR_SUFFIXES
    )
