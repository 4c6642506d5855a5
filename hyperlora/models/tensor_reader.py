"""Types of tensors that are read from files one at a time."""

from collections.abc import Callable

from torch import Tensor

Shape = tuple[int, ...]
TensorReader = Callable[[str], Tensor]
"""Reads one tensor of a network by its name."""
