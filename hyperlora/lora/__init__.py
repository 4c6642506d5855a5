"""What a LoRA is: where it goes (``LoraLayout``), its numbers (``LoraWeights``) and compact ways to write those
(``LiDB``, ``LearnedBasis``).

    W' = W + up @ down            down [rank, fan_in], up [fan_out, rank]; any alpha / rank is folded into up
"""

from hyperlora.lora.layout import UNKNOWN_BASE, LoraLayout, Site
from hyperlora.lora.weights import LoraWeights

__all__ = ["UNKNOWN_BASE", "LoraLayout", "LoraWeights", "Site"]
