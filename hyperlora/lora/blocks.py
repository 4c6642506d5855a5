"""Parts of a LoRA by the blocks of its base: keep some, or weigh each."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches

from hyperlora.errors import BadRequest
from hyperlora.lora.weights import LoraWeights


def part(lora: LoraWeights, blocks: Collection[str]) -> LoraWeights:
    """The sites inside ``blocks``, named like ``unet``, ``unet.up_blocks.0`` or a whole site.

    Raises ``BadRequest`` for a block without any site.
    """
    _require(lora, blocks)
    chosen = [i for i, site in enumerate(lora.layout.sites) if _block(site.name, blocks) is not None]
    layout = replace(lora.layout, sites=tuple(lora.layout.sites[i] for i in chosen))
    return LoraWeights(layout, tuple(lora.down[i] for i in chosen), tuple(lora.up[i] for i in chosen))


def weigh_blocks(lora: LoraWeights, weights: Mapping[str, float]) -> LoraWeights:
    """ΔW times the weight of the narrowest block each site is in (1 if it is in none).

    Example: ``weigh_blocks(lora, {"unet": 0.8, "unet.mid_block": 0.0, "text_encoder": 0.5})``.
    """
    _require(lora, weights)
    of = [_block(site.name, weights) for site in lora.layout.sites]
    up = tuple(u if block is None else u * weights[block] for u, block in zip(lora.up, of, strict=True))
    return LoraWeights(lora.layout, lora.down, up)


def _block(site: str, blocks: Collection[str]) -> str | None:
    """The longest of ``blocks`` that ``site`` lies in."""
    inside = [block for block in blocks if site == block or site.startswith(f"{block}.")]
    return max(inside, key=len, default=None)


def _require(lora: LoraWeights, blocks: Collection[str]) -> None:
    names = [site.name for site in lora.layout.sites]
    for block in blocks:
        if not any(_block(name, [block]) for name in names):
            there = sorted({".".join(name.split(".")[:n]) for name in names for n in (1, 2, 3, 4)})
            near = get_close_matches(block, there, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(there[:8])}, …"
            raise BadRequest(f"the LoRA changes nothing in block {block!r}: {hint}")
