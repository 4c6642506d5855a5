"""Principal components of LoRAs: autoencoders that are learned in closed form, and what a convolution has to beat."""

from typing import Any

import torch
from torch import Tensor, nn

from hyperlora.lora.layout import LoraLayout


class LoraPCA(nn.Module):
    """Rows [batch, numel] to latents [batch, tokens, width] by as many directions as they have numbers, and back."""

    components: Tensor

    def __init__(self, layout: LoraLayout, num_tokens: int = 16, latent_width: int = 16) -> None:
        super().__init__()
        self.layout, self.num_tokens, self.latent_width = layout, num_tokens, latent_width
        self.config: dict[str, Any] = {"tokens": num_tokens, "width": latent_width}
        self.register_buffer("basis", torch.zeros(num_tokens * latent_width, layout.numel))

    @property
    def compression(self) -> float:
        """Numbers of a LoRA per number of its latents."""
        return self.layout.numel / (self.num_tokens * self.latent_width)

    def fit(self, rows: Tensor) -> None:
        """Of rows [n, numel] of mean 0; where they have fewer directions than asked for, zeros are left."""
        self.components.copy_(compute_principal_components(rows, len(self.components)))

    def encode(self, rows: Tensor) -> Tensor:
        """[batch, tokens, width]."""
        return (rows @ self.components.mT).unflatten(-1, (self.num_tokens, self.latent_width))

    def decode(self, latents: Tensor) -> Tensor:
        """[batch, numel]."""
        return latents.flatten(-2) @ self.components


class FactorwiseLoraPCA(nn.Module):
    """Principal components in two steps: ``components_per_factor`` directions of every factor (``down`` or ``up`` of a site) alone, then
    ``num_tokens`` * ``latent_width`` directions of all factors' coefficients together.

    It holds ``components_per_factor`` * numel numbers where ``LoraPCA`` holds ``num_tokens`` * ``latent_width`` * numel, and loses little
    more, since what the LoRAs of one base do to one weight lies near a few directions.
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
        self.layout, self.num_tokens, self.latent_width, self.components_per_factor = (
            layout,
            num_tokens,
            latent_width,
            components_per_factor,
        )
        self.config: dict[str, Any] = {
            "tokens": num_tokens,
            "width": latent_width,
            "each": components_per_factor,
        }
        self.factor_sizes = [
            layout.rank * num_features
            for target in layout.targets
            for num_features in (target.in_features, target.out_features)
        ]
        self.register_buffer("parts", torch.zeros(components_per_factor, layout.numel))
        self.register_buffer(
            "joint",
            torch.zeros(num_tokens * latent_width, len(self.factor_sizes) * components_per_factor),
        )

    @property
    def compression(self) -> float:
        """Numbers of a LoRA per number of its latents."""
        return self.layout.numel / (self.num_tokens * self.latent_width)

    def fit(self, rows: Tensor) -> None:
        """Of rows [n, numel] of mean 0; where they have fewer directions than asked for, zeros are left."""
        factor_components = [
            compute_principal_components(factor_rows, self.components_per_factor)
            for factor_rows in rows.split(self.factor_sizes, -1)
        ]
        self.factor_components.copy_(torch.cat(factor_components, -1))
        self.joint_components.copy_(
            compute_principal_components(
                self._compute_coefficients(rows), len(self.joint_components)
            )
        )

    def encode(self, rows: Tensor) -> Tensor:
        """[batch, tokens, width]."""
        return (self._compute_coefficients(rows) @ self.joint_components.mT).unflatten(
            -1, (self.num_tokens, self.latent_width)
        )

    def decode(self, latents: Tensor) -> Tensor:
        """[batch, numel]."""
        coefficients = (latents.flatten(-2) @ self.joint_components).split(
            self.components_per_factor, -1
        )
        factor_components = self.factor_components.split(self.factor_sizes, -1)
        return torch.cat(
            [
                factor_coefficients @ components
                for factor_coefficients, components in zip(
                    coefficients, factor_components, strict=True
                )
            ],
            -1,
        )

    def _compute_coefficients(self, rows: Tensor) -> Tensor:
        """[batch, factors * each]."""
        factors = zip(
            rows.split(self.factor_sizes, -1),
            self.factor_components.split(self.factor_sizes, -1),
            strict=True,
        )
        return torch.cat([factor_rows @ components.mT for factor_rows, components in factors], -1)


def compute_principal_components(
    rows: Tensor, num_components: int, min_variance_ratio: float = 1e-6
) -> Tensor:
    """The ``num_components`` orthonormal directions of most variance of rows [n, width] of mean 0, [count, width]; zeros in
    place of those whose variance is below ``min_variance_ratio`` of the first's.

    From the eigenvectors of the smaller of rows rowsᵀ and rowsᵀ rows.
    """
    rows = rows.float()
    is_wide = len(rows) < rows.shape[1]
    eigenvalues, eigenvectors = torch.linalg.eigh(
        (rows @ rows.mT if is_wide else rows.mT @ rows).double()
    )
    eigenvectors = eigenvectors.flip(1)[:, :num_components][
        :, eigenvalues.flip(0)[:num_components] > min_variance_ratio * eigenvalues[-1]
    ].float()
    components = torch.linalg.qr(rows.mT @ eigenvectors).Q.mT if is_wide else eigenvectors.mT
    return torch.cat([components, rows.new_zeros(num_components - len(components), rows.shape[1])])
