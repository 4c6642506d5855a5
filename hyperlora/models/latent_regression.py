"""``LatentRegression``: latents of LoRAs as a linear function of the features of photos.

A conditional diffusion may start from an estimate of the mean of its target (CARD, 2206.07275):

    m = (x - x̄) / s · A,      A = argmin Σ ‖m - z‖² + λ ‖A‖²

x are the features of a photo with mean x̄ and deviation s, z the latents of the subject's LoRA.
"""

from typing import Final, TypedDict

import torch
from torch import Tensor, nn

from hyperlora.features import ImageFeatures

_RELATIVE_PENALTIES: Final = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""λ by the number of photos, from which cross-validation chooses."""
_NUM_FOLDS: Final = 4
_MAX_TOKEN_NUMBERS: Final = 4096
"""Image tokens of more numbers than these are averaged."""


class LatentRegressionConfig(TypedDict):
    """Arguments of a ``LatentRegression`` besides the shape of the latents."""

    image_shape: tuple[int, int]
    face_feature_width: int
    rank: int


class LatentRegression(nn.Module):
    """Ridge regression of reduced rank from features of photos to latents, in closed form.

    Several photos of a subject are averaged. Without a fit, the result is 0.

    Letters of shapes: B subjects (batch), V views (photos of one subject), F numbers of the
    features of one photo, R ``rank``, L tokens and Z width of the latents.

    Args:
        num_tokens: Tokens of the latents.
        latent_width: Width of these tokens.
        image_shape: Tokens of an image and their width; (0, 0) to leave images out.
        face_feature_width: Numbers of a face embedding; 0 to leave faces out.
        rank: Rank of A.
    """

    feature_mean: Tensor
    feature_std: Tensor
    down: Tensor
    up: Tensor

    def __init__(
        self,
        num_tokens: int,
        latent_width: int,
        image_shape: tuple[int, int],
        face_feature_width: int,
        rank: int,
    ) -> None:
        super().__init__()
        self.config: LatentRegressionConfig = {
            "image_shape": image_shape,
            "face_feature_width": face_feature_width,
            "rank": rank,
        }
        num_image_tokens, width = image_shape
        self.latent_shape = (num_tokens, latent_width)
        self.averages_tokens = num_image_tokens * width > _MAX_TOKEN_NUMBERS
        num_features = width if self.averages_tokens else num_image_tokens * width
        num_features += face_feature_width
        # buffers, since they are fitted in closed form and no gradient changes them
        self.register_buffer("feature_mean", torch.zeros(num_features))  # x̄ [F]
        self.register_buffer("feature_std", torch.ones(num_features))  # s [F]
        self.register_buffer("down", torch.zeros(num_features, rank))  # A = down up
        self.register_buffer("up", torch.zeros(rank, num_tokens * latent_width))

    @property
    def has_coefficients(self) -> bool:
        """Whether A is known: ``fit`` was called, or a model was loaded."""
        return bool(self.up.any())

    def forward(self, face_features: ImageFeatures, image_features: ImageFeatures) -> Tensor:
        """Estimate the mean of the latents of each subject.

        Args:
            face_features: Tokens [batch, views, 1, face_feature_width]; not used if that is 0.
            image_features: Tokens [batch, views, n, width].

        Returns:
            m, [batch, num_tokens, latent_width].
        """
        x = self.flatten_features(face_features, image_features).mean(1)  # [B, F]
        m = (x - self.feature_mean) / self.feature_std @ self.down @ self.up  # [B, L·Z]
        return m.unflatten(-1, self.latent_shape)

    def flatten_features(
        self, face_features: ImageFeatures, image_features: ImageFeatures
    ) -> Tensor:
        """Return the features of each photo as one vector.

        Args:
            face_features: Tokens [batch, views, 1, face_feature_width]; not used if that is 0.
            image_features: Tokens [batch, views, n, width].

        Returns:
            [batch, views, F].
        """
        vectors = []
        if self.config["image_shape"][0]:
            tokens = image_features.tokens
            vectors.append(tokens.mean(2) if self.averages_tokens else tokens.flatten(2))
        if self.config["face_feature_width"]:
            vectors.append(face_features.tokens.flatten(2))
        return torch.cat(vectors, -1)

    @torch.no_grad()
    def fit(self, features: Tensor, latents: Tensor) -> float:
        """Fit A and its penalty; cross-validation leaves out subjects and sees one photo of each.

        Args:
            features: Result of ``flatten_features``, [subjects, views, F].
            latents: Of the subjects' LoRAs, [subjects, num_tokens, latent_width].

        Returns:
            The chosen λ by the number of photos.
        """
        self.feature_mean.copy_(features.mean((0, 1)))
        std = features.std((0, 1))
        # a feature that never changes stays 0, and does not matter
        self.feature_std.copy_(torch.where(std > 0, std, torch.ones_like(std)))
        x = (features - self.feature_mean) / self.feature_std  # [n, V, F]
        z = latents.flatten(1)  # [n, L·Z]
        penalty = _choose_penalty(x, z)
        matrix = _solve_ridge(x, z, penalty)  # A [F, L·Z]
        # the directions of latent space in which the estimates differ most
        _, _, directions = torch.linalg.svd(x.mean(1) @ matrix, full_matrices=False)
        directions = directions[: self.up.shape[0]]  # [at most R, L·Z]
        self.down.zero_()[:, : len(directions)] = matrix @ directions.mT
        self.up.zero_()[: len(directions)] = directions
        return penalty


def _choose_penalty(x: Tensor, z: Tensor) -> float:
    """Choose the relative penalty with the least error on left out subjects."""
    num_folds = min(_NUM_FOLDS, len(x))
    if num_folds < 2:
        return max(_RELATIVE_PENALTIES)
    folds = torch.arange(len(x), device=x.device) % num_folds
    errors = []
    for penalty in _RELATIVE_PENALTIES:
        error = 0.0
        for fold in range(num_folds):
            held_out = folds == fold
            matrix = _solve_ridge(x[~held_out], z[~held_out], penalty)
            error += float((x[held_out, 0] @ matrix - z[held_out]).square().sum())
        errors.append(error)
    return _RELATIVE_PENALTIES[errors.index(min(errors))]


def _solve_ridge(x: Tensor, z: Tensor, relative_penalty: float) -> Tensor:
    """A = (XᵀX + λ I)⁻¹ Xᵀ Z with λ = ``relative_penalty`` * photos, [F, L·Z].

    Args:
        x: Standardized features, [n, V, F].
        z: Latents, [n, L·Z]; all photos of a subject have the same.
        relative_penalty: λ by the number of photos.
    """
    photos = x.flatten(0, 1)  # [n·V, F]
    gram = photos.mT @ photos  # [F, F]
    gram.diagonal().add_(relative_penalty * len(photos))
    return torch.linalg.solve(gram, x.sum(1).mT @ z)
