"""Fewer directions for a trained hypernetwork with a learned basis, those it hardly uses left out: smaller files."""

import torch
from torch import Tensor

from hyperlora.errors import BadRequest
from hyperlora.lora.heads import LearnedBasis, SoftmaxBasis
from hyperlora.models.hypernetwork import Hypernetwork


@torch.no_grad()
def shrunk(network: Hypernetwork, codes: Tensor, size: int) -> Hypernetwork:
    """A network of ``size`` directions per factor and site that makes nearly the LoRAs of ``network``: of each factor's
    ``codes`` [n, 2 * sites, old size], as seen in training, the principal components in weight space (of ``down``,
    around its mean, which goes into the constant). Raises ``BadRequest`` for another parametrisation than ``basis``
    and for one mixed ``per_rank``."""
    old = network.basis
    if not isinstance(old, LearnedBasis) or isinstance(old, SoftmaxBasis) or not 1 <= size <= old.code_size:
        raise BadRequest(f"only a learned basis can shrink, to 1 ... {old.code_size} directions; {size} asked for")
    if old.per_rank:
        raise BadRequest("a basis mixed per rank cannot shrink: it has one coefficient for each vector of a direction")
    new = Hypernetwork(network.layout, **{**network.config, "head_options": {"size": size}})  # type: ignore[arg-type]
    fresh = new.basis
    assert isinstance(fresh, LearnedBasis)
    same = {k: v for k, v in network.state_dict().items() if new.state_dict()[k].shape == v.shape}
    new.load_state_dict(same, strict=False)
    sites = len(network.layout.sites)
    for factor in range(2 * sites):
        site, down = factor % sites, factor < sites
        directions = (old.down if down else old.up)[site]
        seen = codes[:, factor]
        middle = seen.mean(0) if down else torch.zeros_like(seen[0])
        to_small, from_small = _components(seen - middle, directions, size)
        (fresh.down if down else fresh.up)[site].copy_(from_small @ directions)
        new.head_weight[factor] = to_small.mT @ network.head_weight[factor]
        new.start[factor] = network.start[factor] @ to_small
        if down:
            rest = (middle - middle @ to_small @ from_small) @ directions
            constant = old.constant[site] + rest.view_as(old.constant[site])
            fresh.constant[site].copy_(constant)
    return new


def _components(codes: Tensor, directions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """E [old, size] and R [size, old] with codes E R directions ≈ codes directions, the best of this rank."""
    gram = (directions @ directions.mT).double()
    root = torch.linalg.cholesky(gram + 1e-8 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))
    _, _, components = torch.linalg.svd(codes.double() @ root, full_matrices=False)
    kept = components[:size].mT
    back = torch.linalg.solve_triangular(root.mT, kept, upper=True).mT  # keptᵀ root⁻¹
    return (root @ kept).to(codes.dtype), back.to(codes.dtype)
