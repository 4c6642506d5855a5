"""LyCORIS' adapters as plain LoRAs, exactly.

Every adapter is a sum of products of small factors, so that ΔW = up · down holds with

    adapter       ΔW                                     rank
    LoCon         up · down                              r
    Tucker LoCon  Σ_ab up[o, a] mid[a, b, k] down[b, i]  r
    LoHa          (W1_a W1_b) ⊙ (W2_a W2_b)              r²
    LoKr          W1 ⊗ W2                                rank(W1) · rank(W2)

Sources: LyCORIS (2309.14859) and its ``lycoris/functional``, for ΔW and for what alpha scales.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Final

import torch
from torch import Tensor

_MAX_SVD_SIDE: Final = 256
"""Larger matrices are taken to have full rank, since a decomposition takes too long."""
_RANK_TOLERANCE: Final = 1e-8
"""Relative Frobenius norm that the factors of a matrix may lose."""


@dataclass(frozen=True)
class PlainFactors:
    """The factors of a plain LoRA before alpha, in float64 where they were computed.

    Attributes:
        down: [rank, in], or [rank, in, kh, kw] for a convolution.
        up: [out, rank], or [out, rank, 1, 1] for a convolution.
        scale_rank: alpha / ``scale_rank`` scales ΔW; None where LyCORIS ignores alpha.
    """

    down: Tensor
    up: Tensor
    scale_rank: int | None


def convert_to_plain(tensors: Mapping[str, Tensor]) -> PlainFactors | None:
    """Convert the tensors of one module to the factors of a plain LoRA.

    Args:
        tensors: Tensors by role: ``down`` and ``up`` (LoRA, LoCon), with ``mid`` (Tucker LoCon);
            ``hada_...`` (LoHa); ``lokr_...`` (LoKr).

    Returns:
        The factors, or None if a tensor is missing.

    Raises:
        ValueError: Shapes do not fit each other.
        RuntimeError: Shapes do not fit each other.
    """
    if is_plain(tensors):
        down, up = tensors.get("down"), tensors.get("up")
        return None if down is None or up is None else PlainFactors(down, up, down.shape[0])
    weights = {role: t.double() for role, t in tensors.items() if role != "alpha"}
    if any(role.startswith("hada_") for role in weights):
        return _convert_loha(weights)
    if any(role.startswith("lokr_") for role in weights):
        return _convert_lokr(weights)
    down, up = weights.get("down"), weights.get("up")
    if down is None or up is None:
        return None
    # [a, b, kh, kw] x [b, in] -> [a, in, kh, kw]
    down = torch.einsum("abkl,bi->aikl", weights["mid"], down.flatten(1))
    return PlainFactors(down, up.flatten(1)[..., None, None], down.shape[0])


def is_plain(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the tensors of one module are those of a LoRA or LoCon."""
    return tensors.keys() <= {"down", "up", "alpha"}


def count_plain_numbers(tensors: Mapping[str, Tensor]) -> int:
    """Count the numbers of the plain LoRA that ``convert_to_plain`` makes at most.

    Args:
        tensors: Tensors by role.

    Returns:
        rank · (in + out), without computing anything; 0 for a plain LoRA.
    """
    if is_plain(tensors):
        return 0
    shapes = {role: tuple(tensor.shape) for role, tensor in tensors.items()}
    if "hada_w1_b" in shapes and "hada_w1_a" in shapes:
        (rank, *ins), outs = shapes["hada_w1_b"], shapes["hada_w1_a"]
        kernel = shapes.get("hada_t1", (1, 1))[2:]
        return rank**2 * (prod(ins) * prod(kernel) + max(outs))
    if any(role.startswith("lokr_") for role in shapes):
        return _count_lokr_numbers(shapes)
    return sum(map(prod, shapes.values())) + prod(shapes.get("down", ())) * prod(
        shapes.get("mid", (1, 1))[2:]
    )


def _count_lokr_numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The same for LoKr, from the sides of both matrices."""
    rank = num_rows = num_columns = 1
    for name in ("lokr_w1", "lokr_w2"):
        if name in shapes:
            rows, columns = shapes[name][0], prod(shapes[name][1:])
            side_rank = min(rows, columns)
        else:
            side_rank, columns = (
                shapes.get(f"{name}_b", (1, 1))[0],
                prod(shapes.get(f"{name}_b", (1, 1))[1:]) * prod(shapes.get("lokr_t2", (1, 1))[2:]),
            )
            rows = max(shapes.get(f"{name}_a", (1,)))
        rank, num_rows, num_columns = rank * side_rank, num_rows * rows, num_columns * columns
    return rank * (num_rows + num_columns)


def _convert_loha(weights: Mapping[str, Tensor]) -> PlainFactors | None:
    """(A ⊙ B)[o, n] = Σ_ij w1_a[o, i] w2_a[o, j] · w1_b[i, n] w2_b[j, n]."""
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    if any(name not in weights for name in names):
        return None
    up_1, down_1, up_2, down_2 = (weights[name] for name in names)
    kernel = down_1.shape[2:]
    if "hada_t1" in weights or "hada_t2" in weights:
        if "hada_t1" not in weights or "hada_t2" not in weights:
            return None
        # Tucker's factors of the outputs are stored as [r, out]
        up_1, up_2 = up_1.T, up_2.T
        down_1 = torch.einsum("ijkl,jr->irkl", weights["hada_t1"], down_1)  # [r, in, kh, kw]
        down_2 = torch.einsum("ijkl,jr->irkl", weights["hada_t2"], down_2)
        kernel = down_1.shape[2:]
    rank = down_1.shape[0]
    in_channels = down_1.shape[1]
    up = torch.einsum("oi,oj->oij", up_1.flatten(1), up_2.flatten(1)).flatten(1)  # [out, r²]
    down = torch.einsum("in,jn->ijn", down_1.flatten(1), down_2.flatten(1)).flatten(0, 1)  # [r², n]
    return _make_factors(up, down, in_channels, tuple(kernel), rank)


def _convert_lokr(weights: Mapping[str, Tensor]) -> PlainFactors | None:
    """(U1 V1) ⊗ (U2 V2) = (U1 ⊗ U2) (V1 ⊗ V2)."""
    first, second = _factorize_side(weights, "lokr_w1"), _factorize_side(weights, "lokr_w2")
    if first is None or second is None:
        return None
    (up_1, down_1, _, rank_1), (up_2, down_2, kernel, rank_2) = first, second
    up = _kron(up_1, up_2)  # [a · c, r1 · r2]
    down = _kron(down_1, down_2)  # [r1 · r2, b · d · kh · kw]
    in_channels = down.shape[1] // prod(kernel)
    # as LyCORIS and ComfyUI: alpha is over the rank of the factorized side, and void without one
    return _make_factors(up, down, in_channels, kernel, rank_2 or rank_1)


def _kron(first: Tensor, second: Tensor) -> Tensor:
    """``torch.kron`` of matrices, which fails on some transposed ones."""
    product = torch.einsum("ab,cd->acbd", first, second)
    return product.reshape(len(first) * len(second), -1)


def _factorize_side(
    weights: Mapping[str, Tensor], name: str
) -> tuple[Tensor, Tensor, tuple[int, ...], int | None] | None:
    """Factors U [rows, k], V [k, columns] of one matrix of LoKr, its kernel, and its own rank.

    The rank is None if the file holds the matrix as it is, and the result if a factor is missing.
    """
    if (matrix := weights.get(name)) is not None:
        up, down = _factorize(matrix.flatten(1))
        return up, down, tuple(matrix.shape[2:]), None
    up_factor, down_factor = weights.get(f"{name}_a"), weights.get(f"{name}_b")
    if up_factor is None or down_factor is None:
        return None
    core = weights.get("lokr_t2") if name == "lokr_w2" else None
    if core is not None:  # up [r, c], down [r, d]
        down = torch.einsum("ijkl,jr->irkl", core, down_factor)  # [r, d, kh, kw]
        up_factor, kernel = up_factor.T, tuple(down.shape[2:])
    else:
        down, kernel = down_factor, tuple(down_factor.shape[2:])
    rank = down.shape[0]
    up, down = up_factor.flatten(1), down.flatten(1)
    if up.shape[1] != rank:
        raise ValueError(f"the ranks {up.shape[1]} and {rank} of {name} differ")
    if rank > min(up.shape[0], down.shape[1]):
        up, down = _factorize(up @ down)
    return up, down, kernel, rank


def _factorize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factors U [m, k] and V [k, n] of a matrix [m, n], where k is its rank, at least 1."""
    num_rows, num_columns = matrix.shape
    full_rank = min(num_rows, num_columns)
    if full_rank <= _MAX_SVD_SIDE:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        tails = s.square().flip(0).cumsum(0).flip(0).sqrt()  # norm of what ranks below i leave out
        rank = max(1, int((tails > _RANK_TOLERANCE * tails[0]).sum()))
        if rank < full_rank:
            return u[:, :rank] * s[:rank], v[:rank]
    identity = torch.eye(full_rank, dtype=matrix.dtype)
    return (identity, matrix) if num_rows <= num_columns else (matrix, identity)


def _make_factors(
    up: Tensor, down: Tensor, in_channels: int, kernel: tuple[int, ...], rank: int | None
) -> PlainFactors:
    """Factors from matrices up [out, k] and down [k, in · kh · kw]."""
    if len(kernel) == 2:
        down = down.reshape(len(down), in_channels, *kernel)
        up = up[..., None, None]
    return PlainFactors(down, up, rank)
