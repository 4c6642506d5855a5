"""Sequences in batches."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def split_batches(items: Sequence[T], batch_size: int) -> Iterator[Sequence[T]]:
    """Split a sequence into slices of equal length, as ``itertools.batched`` of Python 3.12 does.

    Args:
        items: Any sequence that can be sliced.
        batch_size: Items per slice, at least 1.

    Returns:
        The slices in order; the last one may be shorter.
    """
    for start in range(0, len(items), batch_size):
        yield items[start : start + batch_size]
