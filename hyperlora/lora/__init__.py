"""What a LoRA is: where it goes (``LoraLayout``), its numbers (``LoraWeights``) and compact ways to write those
(``LiDB``, ``LearnedBasis``; ``WordSites``, where it says other words).

    W' = W + up @ down            down [rank, fan_in], up [fan_out, rank]; any alpha / rank is folded into up
"""

from hyperlora.lora.layout import UNKNOWN_BASE, LoraLayout, Site
from hyperlora.lora.weights import LoraWeights
from hyperlora.lora.words import WordSites

__all__ = ["UNKNOWN_BASE", "LoraLayout", "LoraWeights", "Site", "WordSites"]
