"""Likeness over HTTP is the score that Python would read."""

import pytest
from fastapi.testclient import TestClient

from hyperlora.client import _build_similarity_files
from hyperlora.data.images import read_image, to_tensor
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from tests.service.conftest import photo
from tests.service.test_routes import refusal


def test_of_each_picture_to_the_photos(client: TestClient, likeness: IdentitySimilarity) -> None:
    import torch

    photos, pictures = [photo(10), photo(30)], [photo(200), photo(10), photo(30)]
    body = client.post("/v1/likeness", files=_build_similarity_files(photos, pictures)).json()
    seen = [
        torch.stack([to_tensor(read_image(p), 16) for p in files]) for files in (photos, pictures)
    ]
    assert body["pictures"] == pytest.approx(likeness(*seen).tolist(), abs=1e-4)
    assert body["likeness"] == pytest.approx(sum(body["pictures"]) / 3, abs=1e-4)
    (same,) = client.post(
        "/v1/likeness", files=_build_similarity_files([photo(10)], [photo(10)])
    ).json()["pictures"]
    assert same == pytest.approx(
        (1 - likeness.different_subject_mean)
        / (likeness.same_subject_mean - likeness.different_subject_mean),
        abs=1e-4,
    )
    assert client.get("/v1/models").json()[0]["likeness"] is True


def test_what_is_refused(client: TestClient) -> None:
    refusal(
        client.post("/v1/likeness", files=_build_similarity_files([photo()], [])), 422, "pictures"
    )
    refusal(
        client.post("/v1/likeness", files=_build_similarity_files([photo()], [b"x"])),
        415,
        "a PNG, JPEG or WEBP",
    )
    refusal(
        client.post("/v1/likeness", files=_build_similarity_files([photo()] * 9, [photo()])),
        413,
        "at most 8",
    )
    client.app.state.service.engine.comparing = None  # type: ignore[attr-defined]
    refusal(
        client.post("/v1/likeness", files=_build_similarity_files([photo()], [photo()])),
        400,
        "no evaluator",
    )
    assert client.get("/v1/models").json()[0]["likeness"] is False
