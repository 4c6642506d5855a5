"""What a LoRA is: targets (``layout``), numbers (``weights``), heads and parametrizations.

    W' = W + up @ down            down [rank, in_features], up [out_features, rank]

The scale alpha / rank is folded into ``up``.
"""
