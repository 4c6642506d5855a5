"""Linear layers of the ``LoraAutoencoder`` with weights of their own for each position."""

import re

import torch
from torch import Tensor, nn

from hyperlora.lora.layout import LoraLayout
from hyperlora.models.lora_pca import complete_basis, compute_principal_components


class FactorProjection(nn.Module):
    """Directions of each factor: coefficients u_f = x_f D_f, and x_f = u_f D_fᵀ.

    Letters of shapes: those of ``LoraAutoencoder``; F factors of one kind.

    Args:
        layout: Target modules and rank of the LoRAs.
        factor_kinds: The kind of each factor. Factors of one kind share directions.
        num_directions: K.
    """

    def __init__(self, layout: LoraLayout, factor_kinds: list[str], num_directions: int) -> None:
        super().__init__()
        self.num_directions = num_directions
        self.factor_sizes = layout.factor_sizes  # D_f, in the order of the flat LoRA
        sizes = dict(zip(factor_kinds, self.factor_sizes, strict=True))
        self.kinds = list(sizes)
        self.kind_indices = [self.kinds.index(kind) for kind in factor_kinds]
        self.directions = nn.ParameterList(
            nn.init.orthogonal_(torch.empty(sizes[kind], num_directions)) for kind in self.kinds
        )  # D [D_f, K] of each kind
        is_shared = len(self.kinds) < len(factor_kinds)
        identity = torch.eye(num_directions).repeat(len(factor_kinds), 1, 1)
        self.rotations = nn.Parameter(identity) if is_shared else None  # R [M, K, K]

    def fit(self, rows: Tensor) -> None:
        """Set the directions to the principal components of all factors of a kind."""
        factors = rows.split(self.factor_sizes, -1)  # M times x_f [n, D_f]
        for kind_index, directions in enumerate(self.directions):
            stacked = torch.cat(
                [x for x, k in zip(factors, self.kind_indices, strict=True) if k == kind_index]
            )  # [n F, D_f]
            components = compute_principal_components(stacked, self.num_directions)  # [K, D_f]
            directions.copy_(complete_basis(components).mT)

    def encode(self, rows: Tensor) -> Tensor:
        """Project the factors of flat LoRAs [batch, numel].

        Returns:
            Coefficients u, [batch, num_factors, num_directions].
        """
        factors = zip(rows.split(self.factor_sizes, -1), self.kind_indices, strict=True)
        u = torch.stack([x @ self.directions[kind] for x, kind in factors], 1)  # [B, M, K]
        # u R, with a rotation of each factor
        return u if self.rotations is None else torch.einsum("bmk,mkl->bml", u, self.rotations)

    def decode(self, coefficients: Tensor) -> Tensor:
        """Add up the directions of each factor.

        Args:
            coefficients: u, [batch, num_factors, num_directions].

        Returns:
            Flat LoRAs, [batch, numel].
        """
        if self.rotations is not None:
            # u Rᵀ undoes u R for a rotation
            coefficients = torch.einsum("bmk,mlk->bml", coefficients, self.rotations)
        factors = zip(coefficients.unbind(1), self.kind_indices, strict=True)  # u_f [B, K]
        return torch.cat([u @ self.directions[kind].mT for u, kind in factors], -1)  # [B, D]


class TokenProjection(nn.Module):
    """A linear layer for each token: v_t = g_t J_t, and back g_t = v_t J_tᵀ.

    Args:
        num_tokens: L.
        group_width: G K, numbers of the factors of a token.
        latent_width: Z.
    """

    def __init__(self, num_tokens: int, group_width: int, latent_width: int) -> None:
        super().__init__()
        components = [
            nn.init.orthogonal_(torch.empty(group_width, latent_width)) for _ in range(num_tokens)
        ]
        self.components = nn.Parameter(torch.stack(components))  # J [L, G K, Z]

    def fit(self, groups: Tensor) -> None:
        """Set the components to the principal ones of groups [n, num_tokens, G K]."""
        for token_index, group in enumerate(groups.unbind(1)):  # [n, G K]
            principal = compute_principal_components(group, self.components.shape[-1])  # [Z, G K]
            self.components[token_index] = complete_basis(principal).mT

    def encode(self, groups: Tensor) -> Tensor:
        """Project groups [batch, num_tokens, G K] to [batch, num_tokens, latent_width]."""
        return torch.einsum("bld,ldz->blz", groups, self.components)

    def decode(self, tokens: Tensor) -> Tensor:
        """Project tokens [batch, num_tokens, latent_width] to [batch, num_tokens, G K]."""
        return torch.einsum("blz,ldz->bld", tokens, self.components)


def list_factor_kinds(layout: LoraLayout, by_kind: bool) -> list[str]:
    """Return the kind of each factor.

    Args:
        layout: Target modules and rank of the LoRAs.
        by_kind: Whether factors of equal size, whose paths differ in numbers alone, are of one
            kind; else each factor is a kind of its own.

    Returns:
        Names, in the order of ``LoraLayout.factor_sizes``.
    """
    names = [(target.name, side) for target in layout.targets for side in ("down", "up")]
    if not by_kind:
        return [f"{name}.{side}" for name, side in names]
    return [
        f"{re.sub(r'[0-9]+', '*', name)}.{side}.{size}"
        for (name, side), size in zip(names, layout.factor_sizes, strict=True)
    ]
