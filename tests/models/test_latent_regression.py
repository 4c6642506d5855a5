"""The regression of latents of LoRAs on features of photos."""

import pytest
import torch

from hyperlora.features import ImageFeatures
from hyperlora.models.latent_regression import LatentRegression


def make_photos(num_subjects: int, num_views: int = 2) -> tuple[ImageFeatures, ImageFeatures]:
    """Random faces [n, V, 1, 5] and images [n, V, 3, 4] whose features have other scales."""
    torch.manual_seed(0)
    scales = torch.logspace(-2, 2, 4)
    faces = ImageFeatures(torch.randn(num_subjects, num_views, 1, 5))
    return faces, ImageFeatures(torch.randn(num_subjects, num_views, 3, 4) * scales + 7)


def make_latents(features: torch.Tensor, rank: int) -> torch.Tensor:
    """Latents [n, 2, 3] of a given rank, linear in standardized features of the photos' mean."""
    x = (features - features.mean((0, 1))) / features.std((0, 1))
    return (x.mean(1) @ torch.randn(x.shape[-1], rank) @ torch.randn(rank, 6)).unflatten(1, (2, 3))


@pytest.mark.parametrize("rank", [1, 3])
def test_fit_finds_a_linear_map_of_its_rank(rank: int) -> None:
    faces, images = make_photos(400, num_views=1)
    regression = LatentRegression(2, 3, (3, 4), 5, rank)
    assert not regression.has_coefficients and not regression(faces, images).any()
    latents = make_latents(regression.flatten_features(faces, images), rank)
    penalty = regression.fit(regression.flatten_features(faces, images), latents)
    assert regression.has_coefficients and penalty == 0.03  # no noise: as little as there is
    error = (regression(faces, images) - latents).norm() / latents.norm()
    assert error < 0.05
    too_small = LatentRegression(2, 3, (3, 4), 5, 1)
    too_small.fit(too_small.flatten_features(faces, images), latents)
    is_enough = (too_small(faces, images) - latents).norm() / latents.norm() < 0.05
    assert is_enough == (rank == 1)


def test_fit_equals_ridge_regression_in_closed_form() -> None:
    faces, images = make_photos(30)
    regression = LatentRegression(2, 3, (3, 4), 5, 6)
    features, latents = regression.flatten_features(faces, images), torch.randn(30, 2, 3)
    penalty = regression.fit(features, latents)
    x = ((features - features.mean((0, 1))) / features.std((0, 1))).flatten(0, 1).double()
    z = latents.flatten(1).repeat_interleave(2, 0).double()
    # least squares with rows √λ I below: another way to the same minimum
    padded_x = torch.cat([x, (penalty * len(x)) ** 0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    padded_z = torch.cat([z, z.new_zeros(x.shape[1], z.shape[1])])
    matrix = torch.linalg.lstsq(padded_x, padded_z).solution
    torch.testing.assert_close(regression.down @ regression.up, matrix.float())


def test_penalty_grows_with_noise() -> None:
    faces, images = make_photos(60)
    regression = LatentRegression(2, 3, (3, 4), 5, 6)
    features = regression.flatten_features(faces, images)
    latents = make_latents(features, 6)
    noisy_latents = latents + 20 * torch.randn_like(latents)
    assert regression.fit(features, latents) < regression.fit(features, noisy_latents)


@pytest.mark.parametrize(
    ("image_shape", "face_width", "sees_faces", "sees_images"),
    [((3, 4), 5, True, True), ((3, 4), 0, False, True), ((0, 0), 5, True, False)],
)
def test_regression_sees_the_features_that_it_names(
    image_shape: tuple[int, int], face_width: int, sees_faces: bool, sees_images: bool
) -> None:
    faces, images = make_photos(20)
    regression = LatentRegression(2, 3, image_shape, face_width, 4)
    regression.fit(regression.flatten_features(faces, images), torch.randn(20, 2, 3))
    mean = regression(faces, images)
    changed_faces = regression(ImageFeatures(faces.tokens + 1), images)
    changed_images = regression(faces, ImageFeatures(images.tokens + 1))
    assert torch.equal(mean, changed_faces) != sees_faces
    assert torch.equal(mean, changed_images) != sees_images


def test_many_tokens_are_averaged() -> None:
    regression = LatentRegression(2, 3, (257, 768), 512, 4)
    assert regression.down.shape == (768 + 512, 4)
    tokens = torch.randn(1, 1, 257, 768)
    features = regression.flatten_features(
        ImageFeatures(torch.zeros(1, 1, 1, 512)), ImageFeatures(tokens)
    )
    torch.testing.assert_close(features[0, 0, :768], tokens[0, 0].mean(0))


def test_few_subjects_and_constant_features_give_numbers() -> None:
    faces, images = make_photos(1)
    regression = LatentRegression(2, 3, (3, 4), 5, 4)
    constant = ImageFeatures(torch.zeros_like(faces.tokens))
    regression.fit(regression.flatten_features(constant, images), torch.randn(1, 2, 3))
    assert regression(constant, images).isfinite().all()
