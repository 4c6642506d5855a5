"""The regression of latents of LoRAs on features of photos."""

import pytest
import torch
from torch import Tensor

from hyperlora.features import ImageFeatures
from hyperlora.models.latent_regression import LatentRegression
from tests.mock_cuda import mock_cuda


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
    [((3, 4), 5, True, True), ((3, 4), 0, False, True), ((0, 4), 5, True, False)],
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


def predict_in_closed_form(x: Tensor, z: Tensor, penalty: float) -> Tensor:
    """(XᵀX + λ n I)⁻¹ Xᵀ Z by the singular values of X, in float64."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return (vh.T * (s / (s.square() + penalty * len(x)))) @ u.T @ z.double()


def choose_penalty(features: Tensor, latents: Tensor) -> float:
    """Leave out every fourth subject, and compare the errors on the first photo of each."""
    x = (features - features.mean((0, 1))) / features.std((0, 1))
    z, num_folds = latents.flatten(1), min(4, len(x))
    errors = {}
    for penalty in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
        squared_errors = []
        for fold in range(num_folds):
            held_out = list(range(fold, len(x), num_folds))
            rest = [i for i in range(len(x)) if i not in held_out]
            photos = x[rest].flatten(0, 1)
            matrix = predict_in_closed_form(photos, z[rest].repeat_interleave(2, 0), penalty)
            squared_errors.append((x[held_out, 0].double() @ matrix - z[held_out]).square().sum())
        errors[penalty] = float(sum(squared_errors))
    return min(errors, key=lambda penalty: errors[penalty])


def test_penalty_is_that_of_cross_validation() -> None:
    penalties = set()
    for num_subjects, noise, seed in (
        *((20, 0.0, 0), (13, 1.0, 1), (9, 3.0, 2), (7, 2.0, 3), (6, 4.0, 4), (5, 1.0, 5)),
        *((2, 0.5, 6), (3, 2.0, 7), (3, 4.0, 8), (11, 6.0, 9), (10, 9.0, 10), (4, 2.0, 11)),
    ):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(num_subjects, 1, 4, generator=generator)
        views = torch.randn(num_subjects, 2, 4, generator=generator)
        features = features + (0.1 + 0.1 * noise) * views
        latents = features.mean(1) @ torch.randn(4, 6, generator=generator)
        latents = latents + noise * torch.randn(num_subjects, 6, generator=generator)
        regression = LatentRegression(2, 3, (1, 4), 0, 2)
        penalty = regression.fit(features, latents.unflatten(1, (2, 3)))
        assert penalty == choose_penalty(features, latents.unflatten(1, (2, 3)))
        penalties.add(penalty)
    assert len(penalties) >= 5


def test_two_subjects_are_enough_for_cross_validation() -> None:
    """Opposite features with opposite latents: each predicts the other, so the penalty is small."""
    features, latents = torch.randn(1, 1, 4), torch.randn(1, 2, 3)
    features, latents = features.expand(1, 2, 4), torch.cat([latents, -latents])
    regression = LatentRegression(2, 3, (1, 4), 0, 2)
    assert regression.fit(torch.cat([features, -features]), latents) == 0.03


def test_estimate_of_lower_rank_keeps_the_main_directions() -> None:
    """Over the subjects, the nearest matrix of rank 2 to the full estimate."""
    faces, images = make_photos(30)
    full, low = (LatentRegression(2, 3, (3, 4), 5, rank) for rank in (6, 2))
    features, latents = full.flatten_features(faces, images), torch.randn(30, 2, 3)
    full.fit(features, latents)
    low.fit(features, latents)
    u, s, vh = torch.linalg.svd(full(faces, images).flatten(1), full_matrices=False)
    expected = (u[:, :2] * s[:2]) @ vh[:2]
    torch.testing.assert_close(low(faces, images).flatten(1), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(low.up @ low.up.T, torch.eye(2), atol=1e-5, rtol=1e-5)


def test_forward_averages_standardized_photos() -> None:
    """m = (mean of the photos - x̄) / s · A."""
    faces, images = make_photos(5, num_views=3)
    regression = LatentRegression(2, 3, (3, 4), 5, 2)
    features = regression.flatten_features(faces, images)
    tokens = images.tokens
    assert torch.equal(features[4, 2], torch.cat([*tokens[4, 2], faces.tokens[4, 2, 0]]))
    for name in ("feature_mean", "feature_std", "down", "up"):
        regression.get_buffer(name).copy_(torch.rand(regression.get_buffer(name).shape) + 0.5)
    mean = regression(faces, images)
    for subject in range(5):
        x = sum(features[subject]) / 3
        expected = (x - regression.feature_mean) / regression.feature_std @ regression.down
        torch.testing.assert_close(mean[subject].flatten(), expected @ regression.up)
    assert mean.shape == (5, 2, 3)


def test_fit_replaces_an_earlier_fit() -> None:
    """Two subjects give at most two directions; the others of the first fit are gone."""
    faces, images = make_photos(8)
    regression = LatentRegression(2, 3, (3, 4), 5, 4)
    features = regression.flatten_features(faces, images)
    regression.fit(features, torch.randn(8, 2, 3))
    assert regression.down[:, 2:].any() and regression.up[2:].any()
    penalty = regression.fit(features[:2], torch.randn(2, 2, 3))
    assert penalty in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    assert regression.up[:2].any() and not regression.up[2:].any()
    assert not regression.down[:, 2:].any()
    assert regression.fit(features[:1], torch.randn(1, 2, 3)) == 10.0


def test_constant_features_keep_their_scale() -> None:
    faces, images = make_photos(6)
    tokens = images.tokens.clone()
    tokens[..., 0] = 5.0
    regression = LatentRegression(2, 3, (3, 4), 0, 4)
    features = regression.flatten_features(faces, ImageFeatures(tokens))
    regression.fit(features, torch.randn(6, 2, 3))
    torch.testing.assert_close(regression.feature_mean, features.flatten(0, 1).mean(0))
    std = features.flatten(0, 1).std(0)
    torch.testing.assert_close(regression.feature_std[std > 0], std[std > 0])
    assert regression.feature_std[std == 0].tolist() == [1, 1, 1]
    assert not regression.down[std == 0].any()


@pytest.mark.parametrize(
    ("image_shape", "face_width", "num_features"),
    [((64, 64), 0, 4096), ((64, 64), 3, 4099), ((17, 241), 2, 243), ((0, 0), 7, 7)],
)
def test_tokens_of_up_to_4096_numbers_are_kept(
    image_shape: tuple[int, int], face_width: int, num_features: int
) -> None:
    regression = LatentRegression(2, 3, image_shape, face_width, 5)
    assert regression.feature_mean.tolist() == [0] * num_features
    assert regression.feature_std.tolist() == [1] * num_features
    assert regression.down.shape == (num_features, 5) and regression.up.shape == (5, 6)
    assert regression.config == {
        "image_shape": image_shape,
        "face_feature_width": face_width,
        "rank": 5,
    }
    faces = ImageFeatures(torch.randn(2, 3, 1, face_width))
    images = ImageFeatures(torch.randn(2, 3, *image_shape))
    assert regression.flatten_features(faces, images).shape == (2, 3, num_features)


def test_fit_stays_on_its_device() -> None:
    faces, images = make_photos(6)
    regression = LatentRegression(2, 3, (3, 4), 5, 4)
    features, latents = regression.flatten_features(faces, images), torch.randn(6, 2, 3)
    penalty = regression.fit(features, latents)
    expected = regression.down @ regression.up
    with mock_cuda():
        card = LatentRegression(2, 3, (3, 4), 5, 4).to("cuda")
        assert card.fit(features.to("cuda"), latents.to("cuda")) == penalty
        assert card.down.is_cuda
        torch.testing.assert_close((card.down @ card.up).cpu(), expected)
