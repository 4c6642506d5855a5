"""Seeds of random numbers: their range, and seeds that follow from another."""

from typing import Final

from hyperlora.errors import InvalidArgumentError

MAX_SEED: Final = 2**64 - 1
"""The largest seed that torch and ComfyUI take."""


def validate_seed(seed: int, name: str = "seed") -> int:
    """Check that a seed is one that torch takes.

    Args:
        seed: The seed.
        name: What it is called in the error message.

    Returns:
        The seed.

    Raises:
        InvalidArgumentError: It is below 0 or above ``MAX_SEED``.
    """
    if not 0 <= seed <= MAX_SEED:
        raise InvalidArgumentError(f"{name} from 0 to {MAX_SEED} (2^64 - 1) expected, got {seed}")
    return seed


def compute_seed(first_seed: int, offset: int) -> int:
    """Compute the seed that follows ``offset`` places after another; 0 follows the largest.

    Args:
        first_seed: From 0 to ``MAX_SEED``.
        offset: 0 or more.

    Returns:
        From 0 to ``MAX_SEED``.
    """
    return (first_seed + offset) % (MAX_SEED + 1)
