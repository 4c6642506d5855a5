"""Pairs over HTTP: the LoRA of an edit, and images edited by it."""

import io
import time
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from hyperlora.diffusion.image_editing import edit_images
from hyperlora.lora.io.load import load_lora
from hyperlora.service.engine.edits import EditEngine
from hyperlora.service.engine.requests import EditLoraRequest
from tests.service.conftest import assert_problem, make_photo, post_photos


def invert_image(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).point(lambda v: 255 - v).save(buffer, "PNG")
    return buffer.getvalue()


BEFORE, AFTER = make_photo(), invert_image(make_photo())


def post(
    client: TestClient,
    path: str,
    *files: tuple[str, bytes],
    headers: dict[str, str] | None = None,
    **fields: object,
) -> httpx.Response:
    parts = [(name, (f"{i}.png", data, "image/png")) for i, (name, data) in enumerate(files)]
    return client.post(
        path, files=parts, data={k: str(v) for k, v in fields.items()}, headers=headers or {}
    )


def open_image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_create_edit_lora_returns_the_file_of_the_pipeline(
    client: TestClient, edit_engine: EditEngine
) -> None:
    response = post(
        client, "/v1/loras", ("before", BEFORE), ("after", AFTER), title="inverted", strength=0.5
    )
    assert response.status_code == 200, response.text
    assert "hyperlora-warning" not in response.headers
    file = load_lora(response.content, edit_engine.model.layout)
    expected = edit_engine.model((BEFORE, AFTER), 0.5).weights
    torch.testing.assert_close(file.weights.flatten(), expected.flatten())
    assert file.metadata.title == "inverted" and len(file.metadata.reference_sha256) == 2
    assert EditLoraRequest([(BEFORE, AFTER)]).title == "edit"


def test_edit_image_returns_the_image_of_the_pipeline(
    client: TestClient, edit_engine: EditEngine
) -> None:
    image = make_photo(60)
    files = ("image", image), ("before", BEFORE), ("after", AFTER)
    options = {"num_inference_steps": 2, "seed": 3, "strength": 5}
    response = post(client, "/v1/edits", *files, **options)
    assert response.status_code == 200, response.text
    lora = edit_engine.model((BEFORE, AFTER)) * 5
    repainted = post(client, "/v1/edits", *files, **options, preserve_unedited="false")
    for preserve_unedited, edited in ((True, response), (False, repainted)):
        (expected,) = edit_images(
            edit_engine.base,
            [open_image(image)],
            lora.weights,
            seeds=[3],
            num_inference_steps=2,
            preserve_unedited=preserve_unedited,
        )
        assert (
            abs(np.asarray(open_image(edited.content), int) - np.asarray(expected, int)).max() <= 2
        )

    stored = post(
        client, "/v1/loras", ("before", BEFORE), ("after", AFTER), store="true", strength=5
    )
    digest = stored.headers["etag"].strip('"')
    sampling = {"num_inference_steps": 2, "seed": 3}
    for extra_files, fields in (([("lora", stored.content)], {}), ([], {"lora_id": digest})):
        again = post(client, "/v1/edits", ("image", image), *extra_files, **fields, **sampling)
        assert again.content == response.content


def test_create_edit_lora_warns_of_equal_images(client: TestClient) -> None:
    response = post(client, "/v1/loras", ("before", BEFORE), ("after", BEFORE))
    assert response.status_code == 200
    assert "no change found" in response.headers["hyperlora-warning"]
    assert load_lora(response.content).weights.compute_delta_norms().max() < 1e-5


def test_edit_image_runs_as_a_job(client: TestClient) -> None:
    files = ("image", make_photo(60)), ("before", BEFORE), ("after", AFTER)
    job = post(
        client, "/v1/edits", *files, num_inference_steps=2, headers={"Prefer": "respond-async"}
    )
    assert job.status_code == 202
    for _ in range(400):
        state = client.get(f"/v1/jobs/{job.json()['id']}").json()
        if state["state"] in ("succeeded", "failed"):
            break
        time.sleep(0.05)
    assert state["state"] == "succeeded", state
    assert open_image(client.get(state["result"]).content).size == (16, 16)


def test_list_models_lists_all_kinds(client: TestClient) -> None:
    assert [m["kind"] for m in client.get("/v1/models").json()] == [
        "image-to-lora",
        "lora-diffusion",
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
            {"refine_steps": 3},
            400,
            "leave refine_steps, refine",
        ),
        (
            "/v1/loras",
            [("before", BEFORE), ("after", make_photo(size=30))],
            {},
            400,
            "the same size is expected",
        ),
        (
            "/v1/loras",
            [("before", BEFORE), ("after", b"no image")],
            {},
            415,
            "another kind of file",
        ),
        ("/v1/edits", [("image", BEFORE)], {}, 400, "nothing says what to change"),
        ("/v1/edits", [("image", BEFORE), ("lora", b"no file")], {}, 400, ""),
        ("/v1/edits", [("image", BEFORE)], {"lora_id": "0" * 64}, 404, "no LoRA"),
        (
            "/v1/edits",
            [("image", b"x"), ("before", BEFORE), ("after", AFTER)],
            {},
            415,
            "another kind of file",
        ),
        ("/v1/edits", [("before", BEFORE), ("after", AFTER)], {}, 422, "image"),
    ],
)
def test_edit_routes_refuse_bad_requests(
    client: TestClient, path: str, files: Any, fields: Any, status: int, sentence: str
) -> None:
    response = (
        post(client, path, *files, **fields) if files else client.post(path, data={"title": "x"})
    )
    assert_problem(response, status, sentence)


def test_edit_routes_refuse_without_an_edit_engine(client: TestClient) -> None:
    client.app.state.service.engine.edit_engine = None  # type: ignore[attr-defined]
    assert_problem(
        post(client, "/v1/loras", ("before", BEFORE), ("after", AFTER)),
        400,
        "no model for before/after pairs",
    )
    assert post_photos(client).status_code == 200
