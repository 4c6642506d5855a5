"""Fewer directions for a trained hypernetwork with a learned basis, those it hardly uses left out: smaller files."""

import torch
from torch import Tensor

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.heads import LowRankBasisHead, SoftmaxBasisHead
from hyperlora.models.hypernetwork import Hypernetwork


@torch.no_grad()
def prune_basis(network: Hypernetwork, codes: Tensor, basis_size: int) -> Hypernetwork:
    """A network of ``size`` directions per factor and site that makes nearly the LoRAs of ``network``: of each factor's
    ``fit_lidb_targets`` [n, 2 * sites, old size], as seen in training, the principal components in weight space (of ``down``,
    around its mean, which goes into the constant). Raises ``InvalidArgumentError`` for another parametrisation than ``basis``
    and for one mixed ``per_rank``."""
    old_head = network.head
    if (
        not isinstance(old_head, LowRankBasisHead)
        or isinstance(old_head, SoftmaxBasisHead)
        or not 1 <= basis_size <= old_head.code_size
    ):
        raise InvalidArgumentError(
            f"only a learned basis can shrink, to 1 ... {old_head.code_size} directions; {basis_size} asked for"
        )
    if old_head.coefficients_per_rank:
        raise InvalidArgumentError(
            "a basis mixed per rank cannot shrink: it has one coefficient for each vector of a direction"
        )
    pruned = Hypernetwork(
        network.layout, **{**network.config, "head_options": {"size": basis_size}}
    )  # type: ignore[arg-type]
    pruned_head = pruned.head
    assert isinstance(pruned_head, LowRankBasisHead)
    unchanged_state = {
        k: v for k, v in network.state_dict().items() if pruned.state_dict()[k].shape == v.shape
    }
    pruned.load_state_dict(unchanged_state, strict=False)
    num_targets = len(network.layout.targets)
    for factor in range(2 * num_targets):
        target_index, is_down = factor % num_targets, factor < num_targets
        directions = (old_head.down_basis if is_down else old_head.up_basis)[target_index]
        factor_codes = codes[:, factor]
        mean_code = factor_codes.mean(0) if is_down else torch.zeros_like(factor_codes[0])
        encode_matrix, decode_matrix = _fit_projection(
            factor_codes - mean_code, directions, basis_size
        )
        (pruned_head.down_basis if is_down else pruned_head.up_basis)[target_index].copy_(
            decode_matrix @ directions
        )
        pruned.code_proj[factor] = encode_matrix.mT @ network.code_proj[factor]
        pruned.init_codes[factor] = network.init_codes[factor] @ encode_matrix
        if is_down:
            residual = (mean_code - mean_code @ encode_matrix @ decode_matrix) @ directions
            down_bias = old_head.down_bias[target_index] + residual.view_as(
                old_head.down_bias[target_index]
            )
            pruned_head.down_bias[target_index].copy_(down_bias)
    return pruned


def _fit_projection(
    codes: Tensor, directions: Tensor, num_components: int
) -> tuple[Tensor, Tensor]:
    """E [old, size] and R [size, old] with codes E R directions ≈ codes directions, the best of this rank."""
    gram = (directions @ directions.mT).double()
    gram_cholesky = torch.linalg.cholesky(
        gram + 1e-8 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    )
    _, _, components = torch.linalg.svd(codes.double() @ gram_cholesky, full_matrices=False)
    top_components = components[:num_components].mT
    decode_matrix = torch.linalg.solve_triangular(
        gram_cholesky.mT, top_components, upper=True
    ).mT  # keptᵀ root⁻¹
    return (gram_cholesky @ top_components).to(codes.dtype), decode_matrix.to(codes.dtype)
