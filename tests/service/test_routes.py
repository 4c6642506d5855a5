"""The HTTP contract: requests, results, and problem documents for every refusal."""

import base64
import hashlib
import io
import re
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.merge import merge
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.generate import postprocess_loras
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase
from hyperlora.pipelines.lora_diffusion import LoraDiffusion
from hyperlora.service.engine import loras as lora_engine
from hyperlora.service.file_store import SUFFIXES, FileKind
from tests.service.conftest import Models, StartClient, assert_problem, make_photo, post_photos


def test_create_lora_returns_the_file_of_the_pipeline(client: TestClient, models: Models) -> None:
    response = post_photos(client, make_photo(), make_photo(30), title="Zoë 1")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["etag"] == f'"{hashlib.sha256(response.content).hexdigest()}"'
    assert "Zo%C3%AB%201.safetensors" in response.headers["content-disposition"]
    file = load_lora(response.content, models.model.layout)
    expected = models.model([make_photo(), make_photo(30)]).weights
    torch.testing.assert_close(file.weights.flatten(), expected.flatten())
    assert file.metadata.title == "Zoë 1"
    assert file.metadata.reference_sha256 == tuple(
        hashlib.sha256(p).hexdigest() for p in (make_photo(), make_photo(30))
    )
    assert "hyperlora.consent" not in file.metadata.extra


def test_create_lora_applies_its_options(client: TestClient, models: Models) -> None:
    plain, other = (
        post_photos(client),
        post_photos(client, format="kohya", rank=1, strength=0.5, consent="true", refine_steps=2),
    )
    file = load_lora(other.content)
    assert (file.format, file.weights.layout.rank) == ("kohya", 1)
    assert file.metadata.extra["hyperlora.consent"] == "given"
    assert not torch.allclose(
        file.weights.compute_delta_norms(), load_lora(plain.content).weights.compute_delta_norms()
    )


def test_create_lora_samples_by_method_and_seed(
    client: TestClient, lora_diffusion: LoraDiffusion
) -> None:
    first, again, other = (
        post_photos(client, method="lora-diffusion", seed=seed).content for seed in (1, 1, 2)
    )
    file = load_lora(first, lora_diffusion.layout)
    with torch.no_grad():
        expected = lora_diffusion.generate_batch([[make_photo()]])  # by seed 0
    assert not torch.allclose(file.weights.flatten(), expected[0].flatten())
    unseeded = load_lora(
        post_photos(client, method="lora-diffusion").content, lora_diffusion.layout
    )
    torch.testing.assert_close(unseeded.weights.flatten(), expected[0].flatten())
    assert torch.equal(
        file.weights.flatten(), load_lora(again, lora_diffusion.layout).weights.flatten()
    )
    assert not torch.equal(
        file.weights.flatten(), load_lora(other, lora_diffusion.layout).weights.flatten()
    )
    assert_problem(post_photos(client, seed=1), 400, "is deterministic")
    assert_problem(post_photos(client, method="magic"), 422, "method")


def test_create_lora_refines_with_the_predicting_model(
    client: TestClient, lora_diffusion: LoraDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    refining_models = []

    def record_model(model: ImageToLoraBase, *args: Any) -> LoraWeights:
        refining_models.append(model)
        return postprocess_loras(model, *args)

    monkeypatch.setattr(lora_engine, "postprocess_loras", record_model)
    assert post_photos(client, method="lora-diffusion", refine_steps=1).status_code == 200
    assert refining_models == [lora_diffusion]


def test_create_lora_selects_the_refine_method(client: TestClient, models: Models) -> None:
    assert models.model.identity_embedder is None
    assert (
        post_photos(client, refine_steps=1, refine_method="photos").content
        == post_photos(client, refine_steps=1).content
    )
    assert_problem(
        post_photos(client, refine_steps=1, refine_method="identity"),
        400,
        "cannot recognize anyone",
    )
    assert_problem(
        post_photos(client, refine_method="photos"), 400, "refine_method says how to refine"
    )
    assert_problem(post_photos(client, refine_steps=1, refine_method="magic"), 422, "refine_method")


def test_create_lora_answers_json_and_stores_the_file(client: TestClient) -> None:
    body = post_photos(client, headers={"Accept": "application/json"}, store="true").json()
    data = base64.b64decode(body["content"])
    assert (body["sha256"], body["size"], body["stored"]) == (
        hashlib.sha256(data).hexdigest(),
        len(data),
        True,
    )
    path = f"/v1/loras/{body['sha256']}"
    assert client.get(path).content == data
    assert client.get(path, headers={"If-None-Match": f'"{body["sha256"]}"'}).status_code == 304
    assert client.delete(path).status_code == 204
    assert_problem(client.get(path), 404, "make it again")
    assert_problem(client.delete(path), 404, "no LoRA")


@pytest.mark.parametrize(
    ("kind", "noun", "media_type"),
    [("lora", "LoRA", "application/octet-stream"), ("image", "image", "image/png")],
)
def test_stored_files_are_read_and_deleted_by_id(
    client: TestClient, kind: FileKind, noun: str, media_type: str
) -> None:
    files = client.app.state.service.files  # type: ignore[attr-defined]
    digest = files.store_bytes(b"content", kind, "host testclient")
    path = f"/v1/{kind}s/{digest}"
    response = client.get(path)
    assert (response.content, response.headers["content-type"]) == (b"content", media_type)
    assert f"{digest[:12]}{SUFFIXES[kind]}" in response.headers["content-disposition"]
    assert client.get(path, headers={"If-None-Match": f'"{digest}"'}).status_code == 304
    assert client.delete(path).status_code == 204
    for request in (client.get, client.delete):
        assert_problem(request(path), 404, f"no {noun} {digest} is stored here (any more)")


def test_create_lora_stores_nothing_by_default(client: TestClient, tmp_path: Path) -> None:
    digest = post_photos(client).headers["etag"].strip('"')
    assert_problem(client.get(f"/v1/loras/{digest}"), 404, "store=true")
    assert not list((tmp_path / "state" / "files").rglob("*.safetensors"))


def test_stored_files_expire(start_client: StartClient, tmp_path: Path) -> None:
    client = start_client(retention_s=0.5, sweep_interval_s=0.2)
    digest = post_photos(client, store="true").headers["etag"].strip('"')
    assert client.get(f"/v1/loras/{digest}").status_code == 200
    time.sleep(1.0)
    assert_problem(client.get(f"/v1/loras/{digest}"), 404, "any more")
    assert not list((tmp_path / "state" / "files").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("strategy", "extra"),
    [
        ("merge", {}),
        ("merge", {"gamma": 1.5}),
        ("composite", {}),
        ("spatial", {"regions": [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]}),
    ],
)
def test_generate_image_returns_the_image_of_the_pipeline(
    client: TestClient, models: Models, strategy: str, extra: dict[str, Any]
) -> None:
    from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance
    from hyperlora.diffusion.multi_lora import CompositionConfig, compose_loras

    base = models.base
    files = [post_photos(client, make_photo(shade)).content for shade in (10, 90)]
    loras = [
        {"content": base64.b64encode(file).decode(), "weight": weight}
        for file, weight in zip(files, (2.0, 1.5), strict=True)
    ]
    request = {
        "prompt": "a b",
        "loras": loras,
        "strategy": strategy,
        "num_inference_steps": 3,
        "seed": 5,
        "width": 64,
        "height": 64,
    }
    response = client.post("/v1/images", json=request | extra)
    assert response.status_code == 200, response.text
    pixels = np.asarray(Image.open(io.BytesIO(response.content)))
    weights = [load_lora(file).weights for file in files]
    if "gamma" in extra:
        context = apply_autolora_guidance(base.pipeline, merge(weights, [2.0, 1.5]), 1.5)
    else:
        regions = [tuple(r) for r in extra.get("regions", [])] or None
        context = compose_loras(
            base.pipeline, weights, strategy, [2.0, 1.5], config=CompositionConfig(regions=regions)
        )  # type: ignore[arg-type]
    with context:
        (expected,) = generate_images(
            base, ["a b"], None, seeds=[5], num_inference_steps=3, width=64, height=64
        )
    assert np.abs(pixels.astype(int) - np.asarray(expected).astype(int)).max() <= 2
    image_without_loras = client.post(
        "/v1/images", json={**request, "loras": [], "strategy": "merge"}
    )
    assert image_without_loras.content != response.content


def test_generate_image_loads_loras_of_prompt_tags(
    start_client: StartClient, models: Models, tmp_path: Path
) -> None:
    (tmp_path / "loras").mkdir()
    (models.model([make_photo()]) * 3.0).save(tmp_path / "loras" / "anna.safetensors")
    client = start_client(lora_dir=tmp_path / "loras")

    def generate(prompt: str) -> httpx.Response:
        return client.post(
            "/v1/images",
            json={"prompt": prompt, "num_inference_steps": 2, "width": 64, "height": 64},
        )

    assert generate("a b <lora:anna:1>").content != generate("a b").content
    assert (
        generate("a b <lora:anna:1:step=5-6>").content == generate("a b").content
    )  # in none of the steps
    assert_problem(generate("a b <lora:ana>"), 400, "did you mean 'anna'")
    assert_problem(generate("a b <lora:../../etc/passwd>"), 400, "no LoRA called")


def test_jobs_are_accepted_streamed_and_finished(client: TestClient) -> None:
    accepted = post_photos(client, headers={"Prefer": "respond-async"}, refine_steps=3)
    assert accepted.status_code == 202
    assert accepted.headers["preference-applied"] == "respond-async"
    events = client.get(accepted.headers["location"] + "/events").text
    assert "event: succeeded" in events
    job = client.get(accepted.headers["location"]).json()
    assert (job["state"], job["progress"]) == ("succeeded", 1.0)
    assert load_lora(client.get(job["result"]).content).weights.compute_delta_norms().max() > 0
    assert client.delete(accepted.headers["location"]).json()["state"] == "succeeded"

    image_job = client.post(
        "/v1/images",
        json={"prompt": "a", "num_inference_steps": 2, "width": 64, "height": 64},
        headers={"Prefer": "respond-async"},
    )
    client.get(image_job.headers["location"] + "/events")
    image = client.get(client.get(image_job.headers["location"]).json()["result"])
    assert Image.open(io.BytesIO(image.content)).size == (64, 64)


def test_jobs_report_why_they_failed(client: TestClient) -> None:
    accepted = post_photos(client, b"no image", headers={"Prefer": "respond-async"})
    client.get(accepted.headers["location"] + "/events")
    job = client.get(accepted.headers["location"]).json()
    assert job["state"] == "failed"
    assert "a PNG, JPEG or WEBP image was expected" in job["error"]


def test_cancel_job_frees_the_model(client: TestClient) -> None:
    job = post_photos(client, headers={"Prefer": "respond-async"}, refine_steps=500).headers[
        "location"
    ]
    while client.get(job).json()["progress"] == 0:
        time.sleep(0.01)
    assert client.delete(job).json()["state"] == "cancelled"
    start_time = time.perf_counter()
    assert post_photos(client).status_code == 200
    assert time.perf_counter() - start_time < 2  # 500 steps take longer


def test_jobs_are_visible_to_their_owner_only(
    start_client: StartClient,
) -> None:
    from hyperlora.service.settings import hash_key

    client = start_client(
        key_digests=frozenset(hash_key(k) for k in ("a-long-enough-key", "another-long-key!"))
    )
    mine, yours = (
        {"Authorization": f"Bearer {k}"} for k in ("a-long-enough-key", "another-long-key!")
    )
    first = post_photos(client, headers={"Prefer": "respond-async", **mine}, refine_steps=60)
    second = post_photos(client, headers={"Prefer": "respond-async", **mine}, refine_steps=50)
    assert_problem(client.get(second.headers["location"], headers=yours), 404, "you have no job")
    assert client.delete(second.headers["location"], headers=mine).json()["state"] == "cancelled"
    client.delete(first.headers["location"], headers=mine)


@pytest.mark.parametrize("header", ["Authorization", "X-API-Key"])
def test_auth_accepts_a_key_in_either_header(start_client: StartClient, header: str) -> None:
    from hyperlora.service.settings import hash_key

    client = start_client(key_digests=frozenset({hash_key("a-long-enough-key")}))
    assert_problem(client.get("/v1/models"), 401, "an API key")
    prefix = "Bearer " if header == "Authorization" else ""
    assert_problem(client.get("/v1/models", headers={header: prefix + "wrong"}), 401, "an API key")
    assert (
        client.get("/v1/models", headers={header: prefix + "a-long-enough-key"}).status_code == 200
    )
    assert client.get("/healthz").status_code == 200


def test_auth_limits_the_rate(start_client: StartClient) -> None:
    client = start_client(rate_limit="3/minute")
    assert [client.get("/v1/models").status_code for _ in range(4)] == [200, 200, 200, 429]
    assert 0 < int(client.get("/v1/models").headers["retry-after"]) <= 60


def test_system_routes_describe_the_server(client: TestClient, models: Models) -> None:
    model, *_ = client.get("/v1/models").json()
    assert model["fingerprint"] == models.model.layout.fingerprint
    assert client.get("/readyz").json()["status"] == "ready"
    post_photos(client)
    metrics = client.get("/metrics").text
    assert 'hyperlora_requests_total{method="POST",route="/v1/loras",status="200"} 1.0' in metrics
    assert 'hyperlora_batch_size_count{work="lora"} 1.0' in metrics


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_docs_load_no_file_of_another_server(client: TestClient, path: str) -> None:
    parts = re.findall(r"(?:src|href)=\"([^\"]+)\"", client.get(path).text)
    assert any(part.endswith(".js") for part in parts)
    for part in parts:
        assert part.startswith("/") and client.get(part).status_code == 200


def test_routes_refuse_bad_requests(start_client: StartClient) -> None:
    client = start_client(max_form_bytes=200_000, max_json_bytes=3000, max_photos=2)
    assert_problem(post_photos(client, b""), 415, "is empty")
    assert_problem(post_photos(client, make_photo()[:60]), 415, "damaged or cut off")
    assert_problem(post_photos(client, make_photo(format="BMP")), 415, "is a BMP image, a PNG")
    assert_problem(post_photos(client, make_photo(), make_photo(), make_photo()), 413, "at most 2")
    assert_problem(post_photos(client, b"x" * 300_000), 413, "larger than")
    assert_problem(post_photos(client, rank=0), 422, "rank: ")
    assert_problem(post_photos(client, rank=99), 400, "rank 99")
    assert_problem(post_photos(client, strength="nan"), 422, "strength: ")
    assert_problem(post_photos(client, format="ckpt"), 422, "format: ")
    assert_problem(client.post("/v1/loras", data={"rank": "4"}), 400, "send photos of one subject")
    assert_problem(
        client.post("/v1/loras", content=b"--x", headers={"Content-Type": "multipart/form-data"}),
        400,
        "",
    )
    assert_problem(client.get("/v1/loras/..%2F..%2Fetc%2Fpasswd"), 404, "")
    assert_problem(client.get("/v1/loras/xyz"), 422, "id: ")
    assert_problem(client.put("/v1/loras"), 405, "")
    body = {"prompt": "a", "num_inference_steps": 2}
    assert_problem(client.post("/v1/images", content=b"[" * 4000), 413, "larger than 0.00286 MiB")
    assert_problem(
        client.post("/v1/images", json=body | {"num_inference_steps": 1000}),
        422,
        "num_inference_steps: ",
    )
    assert_problem(client.post("/v1/images", json=body | {"loras": [{}]}), 400, "either the id")
    assert_problem(
        client.post("/v1/images", json=body | {"loras": [{"id": "0" * 64}]}), 404, "no LoRA 0000"
    )
    damaged_file = base64.b64encode(b"not a file").decode()
    assert_problem(
        client.post("/v1/images", json=body | {"loras": [{"content": damaged_file}]}),
        400,
        "not a safetensors file",
    )
    assert_problem(
        client.post("/v1/images", json=body | {"strategy": "composite"}),
        400,
        "needs at least one LoRA",
    )
    assert_problem(
        client.post("/v1/images", json=body | {"prompt": "<lora:x>"}), 400, "no folder of LoRAs"
    )
    for options, status, sentence in (
        ({"prompt": "a <hypernet:x:1>"}, 400, "<hypernet:x:1> is no LoRA"),
        ({"negative_prompt": "b <LoRA:x:1>"}, 400, "the negative prompt names the LoRA 'x'"),
        ({"seed": 2**64}, 422, "seed: "),
        ({"seed": -1}, 422, "seed: "),
    ):
        assert_problem(client.post("/v1/images", json=body | options), status, sentence)
    assert client.post("/v1/images", json=body | {"seed": 2**64 - 1}).status_code == 200


def test_routes_refuse_after_the_deadline_and_when_full(start_client: StartClient) -> None:
    client = start_client(timeout_s=0.3, max_queue_size=1, max_pixels=512**2)
    picture = {"prompt": "a", "num_inference_steps": 50, "width": 512, "height": 512}
    slow = client.post("/v1/images", json=picture, headers={"Prefer": "respond-async"})
    time.sleep(0.3)
    assert_problem(post_photos(client), 504, "longer than 0.3 s")
    waiting = [
        post_photos(client, headers={"Prefer": "respond-async"}, refine_steps=2) for _ in range(4)
    ]
    end_time, errors = time.monotonic() + 20, set[str]()
    while not errors and time.monotonic() < end_time:
        states = [client.get(w.headers["location"]).json() for w in waiting]
        errors = {state["error"] for state in states if state["error"]}
        time.sleep(0.1)
    assert any("requests are waiting already" in error for error in errors), errors
    client.delete(slow.headers["location"])


def test_create_lora_names_the_format_and_its_lost_readers(client: TestClient) -> None:
    json_header = {"Accept": "application/json"}
    model_info = client.get("/v1/models").json()[0]
    response = post_photos(client, headers=json_header)
    assert response.json()["format"] == model_info["lora_format"] == "kohya"
    assert "diffusers" in model_info["lora_readers"]
    assert "hyperlora-warning" not in response.headers
    response = post_photos(client, headers=json_header, format="diffusers")
    assert response.json()["format"] == "diffusers"
    assert "A1111 and kohya read nothing" in response.headers["hyperlora-warning"]
    assert post_photos(client, format="sgm").status_code == 400


def test_routes_limit_what_waits_of_one_owner(start_client: StartClient) -> None:
    client = start_client(max_jobs_per_owner=1)
    prefer = {"Prefer": "respond-async"}
    job = post_photos(client, headers=prefer, refine_steps=500)
    refused = post_photos(client, headers=prefer)
    assert_problem(refused, 429, "you have 1 open jobs already")
    assert refused.headers["retry-after"]
    client.delete(job.headers["location"])
