"""Identity similarity over HTTP is the score that the evaluator computes."""

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from torch import Tensor

from hyperlora.data.images import read_image, to_tensor
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from tests.service.conftest import assert_problem, make_photo


def post_images(client: TestClient, photos: list[bytes], images: list[bytes]) -> httpx.Response:
    """Ask for the identity similarity of images to photos."""
    files = [
        *(("photos", (f"{i}", photo)) for i, photo in enumerate(photos)),
        *(("images", (f"{i}", image)) for i, image in enumerate(images)),
    ]
    return client.post("/v1/identity-similarity", files=files)


def stack_pixels(files: list[bytes]) -> Tensor:
    return torch.stack([to_tensor(read_image(file), 16) for file in files])


def test_compute_similarity_scores_each_image(
    client: TestClient, identity_similarity: IdentitySimilarity
) -> None:
    photos = [make_photo(10), make_photo(30)]
    images = [make_photo(200), make_photo(10), make_photo(30)]
    body = post_images(client, photos, images).json()
    expected = identity_similarity(stack_pixels(photos), stack_pixels(images))
    assert body["similarities"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert body["mean_similarity"] == pytest.approx(sum(body["similarities"]) / 3, abs=1e-4)
    (same,) = post_images(client, [make_photo(10)], [make_photo(10)]).json()["similarities"]
    low, high = (
        identity_similarity.different_subject_mean,
        identity_similarity.same_subject_mean,
    )
    assert same == pytest.approx((1 - low) / (high - low), abs=1e-4)
    assert client.get("/v1/models").json()[0]["supports_identity_similarity"] is True


def test_compute_similarity_refuses_bad_requests(client: TestClient) -> None:
    assert_problem(post_images(client, [make_photo()], []), 422, "images")
    assert_problem(post_images(client, [make_photo()], [b"x"]), 415, "a PNG, JPEG or WEBP")
    assert_problem(post_images(client, [make_photo()] * 9, [make_photo()]), 413, "at most 8")
    client.app.state.service.engine.identity_similarity = None  # type: ignore[attr-defined]
    assert_problem(post_images(client, [make_photo()], [make_photo()]), 400, "no evaluator")
    assert client.get("/v1/models").json()[0]["supports_identity_similarity"] is False
