"""Prune the learned basis of a hypernetwork to the directions that its codes use."""

import torch
from torch import Tensor

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.heads import LowRankBasisHead, SoftmaxBasisHead
from hyperlora.models.hypernetwork import Hypernetwork


@torch.no_grad()
def prune_basis(network: Hypernetwork, codes: Tensor, basis_size: int) -> Hypernetwork:
    """Build a hypernetwork with a smaller basis that predicts nearly the same LoRAs.

    A factor of a LoRA is c D + bias, with the code c [K] and the basis D [K, numel].
    For every factor, the principal components of c D over the codes seen in training become the
    new basis R D. The network's output layer is multiplied by E, so that c E R D ≈ c D. The
    ``down`` factors are centered first, and the part of their mean outside of the components goes
    into the bias. The ``up`` factors have no bias.

    Letters of shapes: n training images, K directions of the old basis, k ``basis_size``, numel
    numbers of one factor, d width of the hypernetwork, r rank.

    Args:
        network: With a ``LowRankBasisHead`` that mixes whole directions.
        codes: As ``predict_codes`` returns them for training images, [n, 2 * num_targets, K].
        basis_size: Directions per factor to keep, from 1 to K.

    Returns:
        The pruned network.

    Raises:
        InvalidArgumentError: If the head is not a low-rank basis, has a coefficient per rank or is
            shared by shape, or if ``basis_size`` is out of range.
    """
    old_head = network.head
    if (
        not isinstance(old_head, LowRankBasisHead)
        or isinstance(old_head, SoftmaxBasisHead)
        or not 1 <= basis_size <= old_head.code_size
    ):
        raise InvalidArgumentError(
            f"only a low-rank basis can be pruned, to 1 ... {old_head.code_size} directions; "
            f"{basis_size} asked for"
        )
    if old_head.coefficients_per_rank:
        raise InvalidArgumentError(
            "a basis mixed per rank cannot be pruned: "
            "it has one coefficient for each vector of a direction"
        )
    if old_head.share_by_shape:
        raise InvalidArgumentError(
            "a basis shared by shape cannot be pruned: one target has the directions of others too"
        )
    pruned_config = {**network.config, "head_options": {"size": basis_size}}
    pruned = Hypernetwork(network.layout, **pruned_config)  # type: ignore[arg-type]
    pruned_head = pruned.head
    assert isinstance(pruned_head, LowRankBasisHead)
    _copy_equal_shapes(network, pruned)

    num_targets = len(network.layout.targets)
    # each factor on its own: down of all targets, then up of all targets, as in the codes
    for factor in range(2 * num_targets):
        target_index, is_down = factor % num_targets, factor < num_targets
        old_basis = old_head.down_basis if is_down else old_head.up_basis
        pruned_basis = pruned_head.down_basis if is_down else pruned_head.up_basis
        directions = old_basis[target_index]  # D [K, numel]
        factor_codes = codes[:, factor]  # c [n, K]
        # [K]; up stays uncentered, since without a bias nothing could hold its mean
        mean_code = factor_codes.mean(0) if is_down else torch.zeros_like(factor_codes[0])

        # E [K, k] and R [k, K] with (c - mean) E R D ≈ (c - mean) D
        encode_matrix, decode_matrix = _fit_projection(
            factor_codes - mean_code, directions, basis_size
        )
        pruned_basis[target_index].copy_(decode_matrix @ directions)  # R D [k, numel]

        # c = init_codes + code_proj h, so c E has E in both terms.
        pruned.code_proj[factor] = encode_matrix.mT @ network.code_proj[factor]  # [k, d]
        pruned.init_codes[factor] = network.init_codes[factor] @ encode_matrix  # [k]
        if is_down:
            # bias' = bias + (mean - mean E R) D
            residual_code = mean_code - mean_code @ encode_matrix @ decode_matrix  # [K]
            old_bias = old_head.down_bias[target_index]  # [r, in_features]
            pruned_head.down_bias[target_index].copy_(
                old_bias + (residual_code @ directions).view_as(old_bias)
            )
    return pruned


def _copy_equal_shapes(source: Hypernetwork, destination: Hypernetwork) -> None:
    """Copy the parameters whose shapes do not depend on the size of the basis."""
    shapes = {name: value.shape for name, value in destination.state_dict().items()}
    unchanged = {
        name: value for name, value in source.state_dict().items() if shapes[name] == value.shape
    }
    destination.load_state_dict(unchanged, strict=False)


def _fit_projection(
    codes: Tensor, directions: Tensor, num_components: int
) -> tuple[Tensor, Tensor]:
    """Fit E and R of given rank that minimize |codes E R directions - codes directions|.

    With the Gram matrix G = D Dᵀ = L Lᵀ, the norm of c D is that of c L. Let V be the first right
    singular vectors of c L. Its best projection is V Vᵀ, so E = L V and R = Vᵀ L⁻¹.

    Args:
        codes: c, [n, K].
        directions: D, [K, numel].
        num_components: Rank of E R.

    Returns:
        E [K, num_components] and R [num_components, K].
    """
    gram = (directions @ directions.mT).double()  # G [K, K]
    # Cholesky needs a positive definite G, also where directions depend on each other
    ridge = 1e-8 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    gram_cholesky = torch.linalg.cholesky(gram + ridge)  # L [K, K], lower triangular
    # rows of Vᵀ, largest singular value first, [min(n, K), K]
    _, _, components = torch.linalg.svd(codes.double() @ gram_cholesky, full_matrices=False)
    top_components = components[:num_components].mT  # V [K, k]
    encode_matrix = gram_cholesky @ top_components  # E = L V  [K, k]
    # Lᵀ X = V gives X = L⁻ᵀ V = Rᵀ, without an inverse
    decode_matrix = torch.linalg.solve_triangular(gram_cholesky.mT, top_components, upper=True).mT
    return encode_matrix.to(codes.dtype), decode_matrix.to(codes.dtype)
