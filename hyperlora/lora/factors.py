"""Factors of a matrix of low rank: truncation by SVD, and zero-padding to a rank.

M ≈ U_k diag(s_k) V_kᵀ = (U_k diag(√s_k)) (diag(√s_k) V_kᵀ)

is the nearest matrix of rank k (Eckart and Young).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the ``rank`` largest singular triplets.

    Args:
        matrix: [*batch, m, n].
        rank: The number of triplets; at most min(m, n) are returned.

    Returns:
        U [*batch, m, k], the *square roots* of the singular values [*batch, k] and
        Vᵀ [*batch, k, n], with k = min(rank, m, n).
    """
    # [*B, m, p], [*B, p], [*B, p, n] with p = min(m, n); s descends
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[..., :rank], s[..., :rank].sqrt(), vh[..., :rank, :]


def compute_low_rank_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute the two factors whose product is the nearest matrix of a rank.

    Args:
        matrix: [*batch, m, n].
        rank: The inner dimension; where it exceeds min(m, n), zeros fill the factors.

    Returns:
        Factors of equal singular values, [*batch, m, rank] and [*batch, rank, n].
    """
    u, root, vh = compute_truncated_svd(matrix, rank)  # [*B, m, k], [*B, k], [*B, k, n]
    # √s to either side: two factors of equal norm, each with a gradient of similar size
    right, left = pad_factors(root[..., :, None] * vh, u * root[..., None, :], rank)
    return left, right


def pad_factors(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Pad the factors of ΔW = up @ down with zeros, which leaves ΔW as it is.

    Args:
        down: [*batch, k, in_features].
        up: [*batch, out_features, k].
        rank: The rank after padding, at least k.

    Returns:
        ``down`` [*batch, rank, in_features] and ``up`` [*batch, out_features, rank].
    """
    num_pad = rank - down.shape[-2]
    # F.pad counts axes from the last: rows after those of down, columns after those of up
    return F.pad(down, (0, 0, 0, num_pad)), F.pad(up, (0, num_pad))


def resize_factors(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute factors of another rank, whose product is nearest to ΔW = up @ down.

    The SVD is that of a small matrix between two QR decompositions; ΔW is never formed.

    Args:
        down: [*batch, r, in_features].
        up: [*batch, out_features, r].
        rank: The new rank.

    Returns:
        ``down`` [*batch, rank, in_features] and ``up`` [*batch, out_features, rank], of equal
        singular values.
    """
    dtype = down.dtype  # neither QR nor SVD exists in half precision
    # up = Q_u R_u and downᵀ = Q_d R_d, so ΔW = Q_u (R_u R_dᵀ) Q_dᵀ
    # with p = min(out, r) and q = min(in, r): sums of LoRAs can have more ranks than features
    q_up, r_up = torch.linalg.qr(up.float())  # [*B, out, p], [*B, p, r]
    q_down, r_down = torch.linalg.qr(down.float().mT)  # [*B, in, q], [*B, q, r]
    # R_u R_dᵀ = U S Vᵀ gives the SVD of ΔW: (Q_u U) S (Q_d V)ᵀ
    # of [*B, p, q], so U [*B, p, k], √S [*B, k] and Vᵀ [*B, k, q] with k = min(rank, p, q)
    u, root, vh = compute_truncated_svd(r_up @ r_down.mT, rank)
    new_up = (q_up @ u) * root[..., None, :]  # [*B, out, k]
    new_down = root[..., :, None] * (vh @ q_down.mT)  # [*B, k, in]
    new_down, new_up = pad_factors(new_down, new_up, rank)
    return new_down.to(dtype), new_up.to(dtype)
