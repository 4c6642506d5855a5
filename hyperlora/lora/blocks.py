"""Parts of a LoRA by the blocks of its base: keep some, or weigh each."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.weights import LoraWeights


def select_blocks(lora: LoraWeights, blocks: Collection[str]) -> LoraWeights:
    """The sites inside ``blocks``, named like ``unet``, ``unet.up_blocks.0`` or a whole site.

    Raises ``InvalidArgumentError`` for a block without any site.
    """
    _check_blocks(lora, blocks)
    indices = [
        i
        for i, target in enumerate(lora.layout.targets)
        if _find_block(target.name, blocks) is not None
    ]
    layout = replace(lora.layout, sites=tuple(lora.layout.targets[i] for i in indices))
    return LoraWeights(
        layout, tuple(lora.down[i] for i in indices), tuple(lora.up[i] for i in indices)
    )


def scale_blocks(lora: LoraWeights, weights: Mapping[str, float]) -> LoraWeights:
    """ΔW times the weight of the narrowest block each site is in (1 if it is in none).

    Example: ``scale_blocks(lora, {"unet": 0.8, "unet.mid_block": 0.0, "text_encoder": 0.5})``.
    """
    _check_blocks(lora, weights)
    block_per_target = [_find_block(target.name, weights) for target in lora.layout.targets]
    up = tuple(
        u if block is None else u * weights[block]
        for u, block in zip(lora.up, block_per_target, strict=True)
    )
    return LoraWeights(lora.layout, lora.down, up)


def _find_block(target_name: str, blocks: Collection[str]) -> str | None:
    """The longest of ``blocks`` that ``target_name`` lies in."""
    matches = [
        block for block in blocks if target_name == block or target_name.startswith(f"{block}.")
    ]
    return max(matches, key=len, default=None)


def _check_blocks(lora: LoraWeights, blocks: Collection[str]) -> None:
    names = [target.name for target in lora.layout.targets]
    for block in blocks:
        if not any(_find_block(name, [block]) for name in names):
            known_blocks = sorted(
                {".".join(name.split(".")[:n]) for name in names for n in (1, 2, 3, 4)}
            )
            suggestions = get_close_matches(block, known_blocks, 1)
            hint = (
                f"did you mean {suggestions[0]!r}?"
                if suggestions
                else f"there are {', '.join(known_blocks[:8])}, …"
            )
            raise InvalidArgumentError(f"the LoRA changes nothing in block {block!r}: {hint}")
