"""Principal components of LoRAs: linear autoencoders that are fitted in closed form."""

from typing import TypedDict

import torch
from torch import Tensor, nn

from hyperlora.lora.layout import LoraLayout


class LoraPCAConfig(TypedDict):
    """Arguments of a ``LoraPCA`` besides its layout, as in ``config.json``."""

    num_tokens: int
    latent_width: int


class FactorwiseLoraPCAConfig(LoraPCAConfig):
    """Arguments of a ``FactorwiseLoraPCA`` besides its layout, as in ``config.json``."""

    components_per_factor: int


class LoraPCA(nn.Module):
    """Projection of LoRAs to their ``num_tokens`` * ``latent_width`` principal components.

        z = x Cᵀ,   x̂ = z C,   C Cᵀ = I

    Letters of shapes: B LoRAs (batch), n LoRAs of the fit, D numbers of a LoRA (``numel``), L
    ``num_tokens``, Z ``latent_width``.

    Args:
        layout: Target modules and rank of the LoRAs.
        num_tokens: Tokens of the latents.
        latent_width: Width of these tokens.
    """

    components: Tensor

    def __init__(self, layout: LoraLayout, num_tokens: int = 16, latent_width: int = 16) -> None:
        super().__init__()
        self.layout, self.num_tokens, self.latent_width = layout, num_tokens, latent_width
        self.config: LoraPCAConfig = {"num_tokens": num_tokens, "latent_width": latent_width}
        # C [L·Z, D]; a buffer, since it is fitted in closed form and no gradient changes it
        self.register_buffer("components", torch.zeros(num_tokens * latent_width, layout.numel))

    @property
    def compression(self) -> float:
        """Numbers of a LoRA per number of its latents."""
        return self.layout.numel / (self.num_tokens * self.latent_width)

    def fit(self, rows: Tensor) -> None:
        """Fit the components to rows [n, numel] of mean 0.

        If the rows span fewer directions, the other components are 0.
        """
        self.components.copy_(compute_principal_components(rows, len(self.components)))

    def encode(self, rows: Tensor) -> Tensor:
        """Encode flat, normalized LoRAs [batch, numel].

        Returns:
            Latents, [batch, num_tokens, latent_width].
        """
        latents = rows @ self.components.mT  # z = x Cᵀ  [B, L·Z]
        # tokens of Z components each, in order of falling variance, for the LoraDiT
        return latents.unflatten(-1, (self.num_tokens, self.latent_width))  # [B, L, Z]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [batch, num_tokens, latent_width].

        Returns:
            Flat, normalized LoRAs, [batch, numel].
        """
        return latents.flatten(-2) @ self.components  # x̂ = z C  [B, D]


class FactorwiseLoraPCA(nn.Module):
    """Principal components in two steps: of each factor, then of all factors' coefficients.

        u_f = x_f C_fᵀ,   z = [u_1, u_2, ...] Jᵀ

    x_f is one factor (``down`` or ``up`` of a target module) and C_f its ``components_per_factor``
    components; J has ``num_tokens`` * ``latent_width`` rows. ``LoraPCA`` stores a full row of
    ``numel`` numbers for each of these. This class stores only ``components_per_factor`` full rows
    and J. It is little less exact, since the LoRAs of one base change each weight along few
    directions.

    Letters of shapes: those of ``LoraPCA``, M factors, D_f numbers of factor f, k
    ``components_per_factor``.

    Args:
        layout: Target modules and rank of the LoRAs.
        num_tokens: Tokens of the latents.
        latent_width: Width of these tokens.
        components_per_factor: Components of each factor.
    """

    factor_components: Tensor
    joint_components: Tensor

    def __init__(
        self,
        layout: LoraLayout,
        num_tokens: int = 8,
        latent_width: int = 16,
        components_per_factor: int = 20,
    ) -> None:
        super().__init__()
        self.layout, self.num_tokens, self.latent_width = layout, num_tokens, latent_width
        self.components_per_factor = components_per_factor
        self.config: FactorwiseLoraPCAConfig = {
            "num_tokens": num_tokens,
            "latent_width": latent_width,
            "components_per_factor": components_per_factor,
        }
        # D_f in the order of LoraWeights.flatten: per target down [r, in], then up [out, r]
        self.factor_sizes = layout.factor_sizes
        num_coefficients = len(self.factor_sizes) * components_per_factor  # M·k
        # C_f [k, D_f] of all factors side by side. The block-diagonal matrix [M·k, D] would hold
        # the same numbers, and M - 1 times as many zeros.
        self.register_buffer("factor_components", torch.zeros(components_per_factor, layout.numel))
        self.register_buffer(
            "joint_components", torch.zeros(num_tokens * latent_width, num_coefficients)
        )  # J [L·Z, M·k]

    @property
    def compression(self) -> float:
        """Numbers of a LoRA per number of its latents."""
        return self.layout.numel / (self.num_tokens * self.latent_width)

    def fit(self, rows: Tensor) -> None:
        """Fit all components to rows [n, numel] of mean 0.

        If the rows span fewer directions, the other components are 0.
        """
        factor_components = [
            compute_principal_components(factor_rows, self.components_per_factor)
            for factor_rows in rows.split(self.factor_sizes, -1)
        ]  # each C_f [k, D_f]
        self.factor_components.copy_(torch.cat(factor_components, -1))  # [k, D]
        # The rows of C_f are orthonormal. Distances of coefficients are therefore distances of the
        # projected LoRAs, and the second fit is the best one among them.
        coefficients = self._compute_coefficients(rows)  # [n, M·k]
        self.joint_components.copy_(
            compute_principal_components(coefficients, len(self.joint_components))
        )

    def encode(self, rows: Tensor) -> Tensor:
        """Encode flat, normalized LoRAs [batch, numel].

        Returns:
            Latents, [batch, num_tokens, latent_width].
        """
        coefficients = self._compute_coefficients(rows)  # u [B, M·k]
        latents = coefficients @ self.joint_components.mT  # z = u Jᵀ  [B, L·Z]
        return latents.unflatten(-1, (self.num_tokens, self.latent_width))  # [B, L, Z]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [batch, num_tokens, latent_width].

        Returns:
            Flat, normalized LoRAs, [batch, numel].
        """
        coefficients = latents.flatten(-2) @ self.joint_components  # u = z J  [B, M·k]
        factors = zip(
            coefficients.split(self.components_per_factor, -1),  # u_f [B, k]
            self.factor_components.split(self.factor_sizes, -1),  # C_f [k, D_f]
            strict=True,
        )
        return torch.cat([u @ components for u, components in factors], -1)  # x̂ [B, D]

    def _compute_coefficients(self, rows: Tensor) -> Tensor:
        """[u_1, u_2, ...], [batch, num_factors * components_per_factor]."""
        factors = zip(
            rows.split(self.factor_sizes, -1),  # x_f [B, D_f]
            self.factor_components.split(self.factor_sizes, -1),  # C_f [k, D_f]
            strict=True,
        )
        return torch.cat([x @ components.mT for x, components in factors], -1)  # u [B, M·k]


def compute_principal_components(
    rows: Tensor, num_components: int, min_variance_ratio: float = 1e-6
) -> Tensor:
    """Compute the orthonormal directions of most variance.

    They are the right singular vectors of X [n, width], taken from the smaller Gram matrix. The
    eigenvectors of Xᵀ X [width, width] are the directions themselves. With the eigenvectors U of
    X Xᵀ [n, n], the directions are Xᵀ U up to length.

    Args:
        rows: X, of mean 0, [n, width].
        num_components: Number of directions.
        min_variance_ratio: Directions with less than this share of the first one's variance are
            replaced by 0.

    Returns:
        Directions in order of falling variance, [num_components, width].
    """
    rows = rows.float()  # X [n, width]
    # with thousands of LoRAs of millions of numbers, only [n, n] fits into memory
    is_wide = len(rows) < rows.shape[1]
    gram = rows @ rows.mT if is_wide else rows.mT @ rows  # [s, s] with s = min(n, width)
    eigenvalues, eigenvectors = torch.linalg.eigh(gram.double())  # [s], [s, s], in rising order
    max_variance = eigenvalues[-1]
    eigenvalues = eigenvalues.flip(0)[:num_components]  # [min(num_components, s)]
    eigenvectors = eigenvectors.flip(1)[:, :num_components]  # U, one per column
    # The float32 Gram matrix is exact to about 1e-7 of its largest eigenvalue, so eigenvectors
    # near that are rounding errors. Of the first num_components, k remain: [s, k].
    eigenvectors = eigenvectors[:, eigenvalues > min_variance_ratio * max_variance].float()
    # QR gives the directions Xᵀ U unit length and removes what rounding left of their overlap:
    # [k, width]
    components = torch.linalg.qr(rows.mT @ eigenvectors).Q.mT if is_wide else eigenvectors.mT
    num_missing = num_components - len(components)
    # a component of 0 has the latent 0 and adds nothing to what is decoded
    return torch.cat([components, rows.new_zeros(num_missing, rows.shape[1])])


def complete_basis(components: Tensor) -> Tensor:
    """Replace rows of zeros by directions that are orthogonal to the other rows.

    Args:
        components: Orthonormal rows and, after them, rows of zeros, [n, width].

    Returns:
        Orthonormal rows, [n, width]. Those that were not 0 are as they were, up to sign. Rows
        after the first ``width`` stay 0.
    """
    num_rows, width = components.shape
    # QR keeps the directions that come first; for columns of zeros it finds orthogonal ones
    basis = torch.linalg.qr(components[:width].mT).Q.mT
    return torch.cat([basis, components.new_zeros(num_rows - len(basis), width)])
