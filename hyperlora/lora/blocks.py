"""Parts of a LoRA by the blocks of its base: select some, or scale each."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.weights import LoraWeights

_MAX_BLOCK_DEPTH = 4
_MAX_LISTED_BLOCKS = 8


def select_blocks(lora: LoraWeights, blocks: Collection[str]) -> LoraWeights:
    """Keep the targets inside some blocks.

    Args:
        lora: One LoRA or a batch.
        blocks: Prefixes of target names, e.g. ``unet``, ``unet.up_blocks.0`` or a whole name.

    Returns:
        The LoRA over the selected targets, in layout order.

    Raises:
        InvalidArgumentError: A block holds no target of the LoRA.
    """
    _check_blocks(lora, blocks)
    indices = [
        i
        for i, target in enumerate(lora.layout.targets)
        if _find_block(target.name, blocks) is not None
    ]
    layout = replace(lora.layout, targets=tuple(lora.layout.targets[i] for i in indices))
    down = tuple(lora.down[i] for i in indices)
    up = tuple(lora.up[i] for i in indices)
    return LoraWeights(layout, down, up)


def scale_blocks(lora: LoraWeights, weights: Mapping[str, float]) -> LoraWeights:
    """Scale ΔW of every target by the weight of the smallest block that contains it.

    Example: ``scale_blocks(lora, {"unet": 0.8, "unet.mid_block": 0.0, "text_encoder": 0.5})``.

    Args:
        lora: One LoRA or a batch.
        weights: The factor of each block; targets outside of all blocks keep their ΔW.

    Returns:
        The LoRA over the same layout.

    Raises:
        InvalidArgumentError: A block holds no target of the LoRA.
    """
    _check_blocks(lora, weights)
    block_per_target = [_find_block(target.name, weights) for target in lora.layout.targets]
    up = tuple(
        u if block is None else u * weights[block]
        for u, block in zip(lora.up, block_per_target, strict=True)
    )
    return LoraWeights(lora.layout, lora.down, up)


def _find_block(target_name: str, blocks: Collection[str]) -> str | None:
    """The longest of ``blocks`` that contains the target."""
    matches = [
        block for block in blocks if target_name == block or target_name.startswith(f"{block}.")
    ]
    return max(matches, key=len, default=None)


def _check_blocks(lora: LoraWeights, blocks: Collection[str]) -> None:
    """Raise ``InvalidArgumentError`` for a block without target."""
    names = [target.name for target in lora.layout.targets]
    for block in blocks:
        if not any(_find_block(name, [block]) for name in names):
            known_blocks = sorted(
                {
                    ".".join(name.split(".")[:depth])
                    for name in names
                    for depth in range(1, _MAX_BLOCK_DEPTH + 1)
                }
            )
            suggestions = get_close_matches(block, known_blocks, 1)
            hint = (
                f"did you mean {suggestions[0]!r}?"
                if suggestions
                else f"there are {', '.join(known_blocks[:_MAX_LISTED_BLOCKS])}, …"
            )
            raise InvalidArgumentError(f"the LoRA changes nothing in block {block!r}: {hint}")
