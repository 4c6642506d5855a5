"""Pairs over HTTP: the LoRA of a change, and pictures edited by it."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from hyperlora.diffusion.image_editing import edit_images
from hyperlora.lora.io.load import load_lora
from hyperlora.service.engine.edits import EditEngine
from tests.service.conftest import photo, send
from tests.service.test_routes import refusal


def inverted(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).point(lambda v: 255 - v).save(buffer, "PNG")
    return buffer.getvalue()


BEFORE, AFTER = photo(), inverted(photo())


def post(
    client: TestClient, path: str, *files: tuple[str, bytes], headers: Any = None, **fields: Any
) -> Any:
    parts = [(name, (f"{i}.png", data, "image/png")) for i, (name, data) in enumerate(files)]
    return client.post(
        path, files=parts, data={k: str(v) for k, v in fields.items()}, headers=headers or {}
    )


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_a_pair_becomes_the_file_that_python_would_make(
    client: TestClient, changes: EditEngine
) -> None:
    response = post(
        client, "/v1/loras", ("before", BEFORE), ("after", AFTER), title="inverted", strength=0.5
    )
    assert response.status_code == 200, response.text
    assert "hyperlora-notice" not in response.headers
    file = load_lora(response.content, changes.model.layout)
    expected = changes.model((BEFORE, AFTER), 0.5)
    torch.testing.assert_close(file.weights.flatten(), expected.flatten())
    assert file.metadata.title == "inverted" and len(file.metadata.reference_sha256) == 2


def test_an_edit_is_what_python_would_make(client: TestClient, changes: EditEngine) -> None:
    other = photo(60)
    files = ("picture", other), ("before", BEFORE), ("after", AFTER)
    options = {"steps": 2, "seed": 3, "strength": 5}
    response = post(client, "/v1/edits", *files, **options)
    assert response.status_code == 200, response.text
    change = changes.model((BEFORE, AFTER)) * 5
    for keep_rest, sent in (
        (True, response),
        (False, post(client, "/v1/edits", *files, **options, repaint="true")),
    ):
        (expected,) = edit_images(
            changes.base,
            [opened(other)],
            change,
            seeds=[3],
            num_inference_steps=2,
            preserve_unedited=keep_rest,
        )
        assert abs(np.asarray(opened(sent.content), int) - np.asarray(expected, int)).max() <= 2

    kept = post(client, "/v1/loras", ("before", BEFORE), ("after", AFTER), keep="true", strength=5)
    digest = kept.headers["etag"].strip('"')
    for sent in ({"files": [("lora", kept.content)]}, {"fields": {"lora_id": digest}}):
        again = post(
            client,
            "/v1/edits",
            ("picture", other),
            *sent.get("files", []),
            **sent.get("fields", {}),
            steps=2,
            seed=3,
        )
        assert again.content == response.content


def test_doubts_are_told_and_the_result_still_comes(client: TestClient) -> None:
    response = post(client, "/v1/loras", ("before", BEFORE), ("after", BEFORE))
    assert response.status_code == 200
    assert "no change found" in response.headers["hyperlora-notice"]
    assert load_lora(response.content).weights.compute_delta_norms().max() < 1e-5


def test_as_a_job(client: TestClient) -> None:
    files = ("picture", photo(60)), ("before", BEFORE), ("after", AFTER)
    job = post(client, "/v1/edits", *files, steps=2, headers={"Prefer": "respond-async"})
    assert job.status_code == 202
    for _ in range(400):
        state = client.get(f"/v1/jobs/{job.json()['id']}").json()
        if state["state"] in ("succeeded", "failed"):
            break
    assert state["state"] == "succeeded", state
    assert opened(client.get(state["result"]).content).size == (16, 16)


def test_both_models_are_told(client: TestClient) -> None:
    assert [m["kind"] for m in client.get("/v1/models").json()] == [
        "image-to-lora",
        "difflora",
        "pair-to-lora",
    ]


@pytest.mark.parametrize(
    ("path", "files", "fields", "status", "sentence"),
    [
        ("/v1/loras", [("before", BEFORE)], {}, 400, "one after for each before"),
        (
            "/v1/loras",
            [("before", BEFORE), ("after", AFTER), ("photos", BEFORE)],
            {},
            400,
            "and not both",
        ),
        ("/v1/loras", [], {}, 400, "send photos of one subject, or before and after"),
        (
            "/v1/loras",
            [("before", BEFORE), ("after", AFTER)],
            {"refine": 3},
            400,
            "leave rank, refine",
        ),
        (
            "/v1/loras",
            [("before", BEFORE), ("after", photo(size=30))],
            {},
            400,
            "the same size is expected",
        ),
        (
            "/v1/loras",
            [("before", BEFORE), ("after", b"no picture")],
            {},
            415,
            "another kind of file",
        ),
        ("/v1/edits", [("picture", BEFORE)], {}, 400, "nothing says what to change"),
        ("/v1/edits", [("picture", BEFORE), ("lora", b"no file")], {}, 400, ""),
        ("/v1/edits", [("picture", BEFORE)], {"lora_id": "0" * 64}, 404, "no LoRA"),
        (
            "/v1/edits",
            [("picture", b"x"), ("before", BEFORE), ("after", AFTER)],
            {},
            415,
            "another kind of file",
        ),
        ("/v1/edits", [("before", BEFORE), ("after", AFTER)], {}, 422, "picture"),
    ],
)
def test_what_is_refused(
    client: TestClient, path: str, files: Any, fields: Any, status: int, sentence: str
) -> None:
    response = (
        post(client, path, *files, **fields) if files else client.post(path, data={"title": "x"})
    )
    refusal(response, status, sentence)


def test_a_server_without_pairs(serving: Any, client: TestClient) -> None:
    client.app.state.service.engine.changes = None  # type: ignore[attr-defined]
    refusal(
        post(client, "/v1/loras", ("before", BEFORE), ("after", AFTER)),
        400,
        "no model for before/after pairs",
    )
    assert send(client).status_code == 200
