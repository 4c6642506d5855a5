"""What a LoRA is: where it goes (``layout``), its numbers (``weights``), and how networks and optimizers write them.

W' = W + up @ down            down [rank, in_features], up [out_features, rank]; alpha / rank is folded into up
"""
