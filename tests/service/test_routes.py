"""The contract: what goes in, what comes out, and every refusal a problem document with a sentence."""

import base64
import hashlib
import io
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.merge import merge
from hyperlora.pipelines.generate import postprocess_loras
from hyperlora.service.engine import local
from tests.service.conftest import photo, send


def refusal(response: Any, status: int, sentence: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert sentence in body["detail"], body["detail"]


def test_a_photo_becomes_the_file_that_python_would_make(client: TestClient, models: Any) -> None:
    response = send(client, photo(), photo(30), title="Zoë 1")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["etag"] == f'"{hashlib.sha256(response.content).hexdigest()}"'
    assert "Zo%C3%AB%201.safetensors" in response.headers["content-disposition"]
    file = load_lora(response.content, models[0].layout)
    expected = models[0]([photo(), photo(30)])
    torch.testing.assert_close(file.weights.flatten(), expected.flatten())
    assert file.metadata.title == "Zoë 1"
    assert file.metadata.reference_sha256 == tuple(
        hashlib.sha256(p).hexdigest() for p in (photo(), photo(30))
    )
    assert "hyperlora.consent" not in file.metadata.extra


def test_options_reach_the_file(client: TestClient, models: Any) -> None:
    plain, other = (
        send(client),
        send(client, format="kohya", rank=1, strength=0.5, consent="true", refine=2),
    )
    file = load_lora(other.content)
    assert (file.format, file.weights.layout.rank) == ("kohya", 1)
    assert file.metadata.extra["hyperlora.consent"] == "given"
    assert not torch.allclose(
        file.weights.compute_delta_norms(), load_lora(plain.content).weights.compute_delta_norms()
    )


def test_another_method_makes_another_sample_for_every_seed(
    client: TestClient, sampler: Any
) -> None:
    first, again, other = (send(client, method="difflora", seed=seed).content for seed in (1, 1, 2))
    file = load_lora(first, sampler.layout)
    with torch.no_grad():
        expected = sampler.batch([[photo()]])  # by seed 0
    assert not torch.allclose(file.weights.flatten(), expected[0].flatten())
    unseeded = load_lora(send(client, method="difflora").content, sampler.layout)
    torch.testing.assert_close(unseeded.weights.flatten(), expected[0].flatten())
    assert torch.equal(file.weights.flatten(), load_lora(again, sampler.layout).weights.flatten())
    assert not torch.equal(
        file.weights.flatten(), load_lora(other, sampler.layout).weights.flatten()
    )
    refusal(send(client, seed=1), 400, "leaves nothing to chance")
    refusal(send(client, method="magic"), 422, "method")


def test_a_lora_is_refined_by_the_model_that_made_it(
    client: TestClient, sampler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def watched(model: Any, *rest: Any) -> Any:
        asked.append(model)
        return postprocess_loras(model, *rest)

    monkeypatch.setattr(local, "finished", watched)
    assert send(client, method="difflora", refine=1).status_code == 200
    assert asked == [sampler]


def test_the_way_to_refine_is_asked_for(client: TestClient, models: Any) -> None:
    assert models[0].identity is None
    assert send(client, refine=1, refine_by="photos").content == send(client, refine=1).content
    refusal(send(client, refine=1, refine_by="identity"), 400, "cannot recognise anyone")
    refusal(send(client, refine_by="photos"), 400, "give the number of steps")
    refusal(send(client, refine=1, refine_by="magic"), 422, "refine_by")


def test_json_twin_and_keeping(client: TestClient) -> None:
    body = send(client, headers={"Accept": "application/json"}, keep="true").json()
    data = base64.b64decode(body["content"])
    assert (body["sha256"], body["size"], body["kept"]) == (
        hashlib.sha256(data).hexdigest(),
        len(data),
        True,
    )
    path = f"/v1/loras/{body['sha256']}"
    assert client.get(path).content == data
    assert client.get(path, headers={"If-None-Match": f'"{body["sha256"]}"'}).status_code == 304
    assert client.delete(path).status_code == 204
    refusal(client.get(path), 404, "make it again")
    refusal(client.delete(path), 404, "no LoRA")


def test_nothing_is_kept_unless_asked(client: TestClient, tmp_path: Path) -> None:
    found = send(client).headers["etag"].strip('"')
    refusal(client.get(f"/v1/loras/{found}"), 404, "keep=true")
    assert not list((tmp_path / "state" / "files").rglob("*.safetensors"))


def test_what_is_kept_has_a_lifetime(serving: Callable[..., TestClient], tmp_path: Path) -> None:
    client = serving(keep_seconds=0.5, sweep_seconds=0.2)
    found = send(client, keep="true").headers["etag"].strip('"')
    assert client.get(f"/v1/loras/{found}").status_code == 200
    time.sleep(1.0)
    refusal(client.get(f"/v1/loras/{found}"), 404, "any more")
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
def test_a_picture_is_what_python_would_draw(
    client: TestClient, models: Any, strategy: str, extra: dict[str, Any]
) -> None:
    from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance
    from hyperlora.diffusion.multi_lora import compose_loras

    _, base = models
    one, two = send(client, photo(10)).content, send(client, photo(90)).content
    loras = [
        {"content": base64.b64encode(f).decode(), "weight": w} for f, w in ((one, 2.0), (two, 1.5))
    ]
    request = {
        "prompt": "a b",
        "loras": loras,
        "strategy": strategy,
        "steps": 3,
        "seed": 5,
        "width": 64,
        "height": 64,
    }
    response = client.post("/v1/images", json=request | extra)
    assert response.status_code == 200, response.text
    drawn = np.asarray(Image.open(io.BytesIO(response.content)))
    opened = [load_lora(f).weights for f in (one, two)]
    if "gamma" in extra:
        context = apply_autolora_guidance(base.pipeline, merge(opened, [2.0, 1.5]), 1.5)
    else:
        regions = [tuple(r) for r in extra.get("regions", [])] or None
        context = compose_loras(base.pipeline, opened, strategy, [2.0, 1.5], regions=regions)  # type: ignore[arg-type]
    with context:
        (expected,) = generate_images(
            base, ["a b"], None, seeds=[5], num_inference_steps=3, width=64, height=64
        )
    assert np.abs(drawn.astype(int) - np.asarray(expected).astype(int)).max() <= 2
    without = client.post("/v1/images", json={**request, "loras": [], "strategy": "merge"})
    assert without.content != response.content


def test_prompts_name_loras_of_the_folder(
    serving: Callable[..., TestClient], models: Any, tmp_path: Path
) -> None:
    (tmp_path / "loras").mkdir()
    save_lora(models[0]([photo()]) * 3.0, tmp_path / "loras" / "anna.safetensors")
    client = serving(loras=tmp_path / "loras")

    def ask(prompt: str) -> Any:
        return client.post(
            "/v1/images", json={"prompt": prompt, "steps": 2, "width": 64, "height": 64}
        )

    assert ask("a b <lora:anna:1>").content != ask("a b").content
    assert ask("a b <lora:anna:1:step=5-6>").content == ask("a b").content  # in none of the steps
    refusal(ask("a b <lora:ana>"), 400, "did you mean 'anna'")
    refusal(ask("a b <lora:../../etc/passwd>"), 400, "no LoRA called")


def test_a_job_is_accepted_followed_and_done(client: TestClient) -> None:
    accepted = send(client, headers={"Prefer": "respond-async"}, refine=3)
    assert accepted.status_code == 202
    assert accepted.headers["preference-applied"] == "respond-async"
    events = client.get(accepted.headers["location"] + "/events").text
    assert "event: succeeded" in events
    job = client.get(accepted.headers["location"]).json()
    assert (job["state"], job["progress"]) == ("succeeded", 1.0)
    assert load_lora(client.get(job["result"]).content).weights.compute_delta_norms().max() > 0
    assert client.delete(accepted.headers["location"]).json()["state"] == "succeeded"

    picture = client.post(
        "/v1/images",
        json={"prompt": "a", "steps": 2, "width": 64, "height": 64},
        headers={"Prefer": "respond-async"},
    )
    client.get(picture.headers["location"] + "/events")
    made = client.get(client.get(picture.headers["location"]).json()["result"])
    assert Image.open(io.BytesIO(made.content)).size == (64, 64)


def test_a_job_that_cannot_succeed_says_why(client: TestClient) -> None:
    accepted = send(client, b"no image", headers={"Prefer": "respond-async"})
    client.get(accepted.headers["location"] + "/events")
    job = client.get(accepted.headers["location"]).json()
    assert job["state"] == "failed"
    assert "a PNG, JPEG or WEBP image was expected" in job["error"]


def test_a_cancelled_job_frees_the_model(client: TestClient) -> None:
    job = send(client, headers={"Prefer": "respond-async"}, refine=500).headers["location"]
    while client.get(job).json()["progress"] == 0:
        time.sleep(0.01)
    assert client.delete(job).json()["state"] == "cancelled"
    began = time.perf_counter()
    assert send(client).status_code == 200
    assert time.perf_counter() - began < 2  # 500 steps take longer


def test_jobs_can_be_cancelled_and_belong_to_their_owner(
    serving: Callable[..., TestClient],
) -> None:
    from hyperlora.service.settings import hash_key

    client = serving(
        keys=frozenset(hash_key(k) for k in ("a-long-enough-key", "another-long-key!"))
    )
    mine, yours = (
        {"Authorization": f"Bearer {k}"} for k in ("a-long-enough-key", "another-long-key!")
    )
    first = send(client, headers={"Prefer": "respond-async", **mine}, refine=60)
    second = send(client, headers={"Prefer": "respond-async", **mine}, refine=50)
    refusal(client.get(second.headers["location"], headers=yours), 404, "you have no job")
    assert client.delete(second.headers["location"], headers=mine).json()["state"] == "cancelled"
    client.delete(first.headers["location"], headers=mine)


@pytest.mark.parametrize("header", ["Authorization", "X-API-Key"])
def test_keys(serving: Callable[..., TestClient], header: str) -> None:
    from hyperlora.service.settings import hash_key

    client = serving(keys=frozenset({hash_key("a-long-enough-key")}))
    refusal(client.get("/v1/models"), 401, "an API key")
    given = "Bearer " if header == "Authorization" else ""
    refusal(client.get("/v1/models", headers={header: given + "wrong"}), 401, "an API key")
    assert (
        client.get("/v1/models", headers={header: given + "a-long-enough-key"}).status_code == 200
    )
    assert client.get("/healthz").status_code == 200


def test_rate(serving: Callable[..., TestClient]) -> None:
    client = serving(rate="3/minute")
    assert [client.get("/v1/models").status_code for _ in range(4)] == [200, 200, 200, 429]
    assert 0 < int(client.get("/v1/models").headers["retry-after"]) <= 60


def test_what_is_here(client: TestClient, models: Any) -> None:
    model, *_ = client.get("/v1/models").json()
    assert model["fingerprint"] == models[0].layout.fingerprint
    assert client.get("/readyz").json()["status"] == "ready"
    send(client)
    metrics = client.get("/metrics").text
    assert 'hyperlora_requests_total{method="POST",route="/v1/loras",status="200"} 1.0' in metrics
    assert 'hyperlora_batch_size_count{work="lora"} 1.0' in metrics


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_description_asks_no_other_server_for_anything(client: TestClient, path: str) -> None:
    parts = re.findall(r"(?:src|href)=\"([^\"]+)\"", client.get(path).text)
    assert any(part.endswith(".js") for part in parts)
    for part in parts:
        assert part.startswith("/") and client.get(part).status_code == 200


def test_bad_requests(serving: Callable[..., TestClient]) -> None:
    client = serving(max_body=200_000, max_json=3000, max_photos=2)
    refusal(send(client, b""), 415, "is empty")
    refusal(send(client, photo()[:60]), 415, "damaged or cut off")
    refusal(send(client, photo(format="BMP")), 415, "another kind of file")
    refusal(send(client, photo(), photo(), photo()), 413, "at most 2")
    refusal(send(client, b"x" * 300_000), 413, "larger than")
    refusal(send(client, rank=0), 422, "rank: ")
    refusal(send(client, rank=99), 400, "rank 99")
    refusal(send(client, strength="nan"), 422, "strength: ")
    refusal(send(client, format="ckpt"), 422, "format: ")
    refusal(client.post("/v1/loras", data={"rank": "4"}), 400, "send photos of one subject")
    refusal(
        client.post("/v1/loras", content=b"--x", headers={"Content-Type": "multipart/form-data"}),
        400,
        "",
    )
    refusal(client.get("/v1/loras/..%2F..%2Fetc%2Fpasswd"), 404, "")
    refusal(client.get("/v1/loras/xyz"), 422, "id: ")
    refusal(client.put("/v1/loras"), 405, "")
    draw = {"prompt": "a", "steps": 2}
    refusal(client.post("/v1/images", content=b"[" * 4000), 413, "larger than 0.00286 MiB")
    refusal(client.post("/v1/images", json=draw | {"steps": 1000}), 422, "steps: ")
    refusal(client.post("/v1/images", json=draw | {"loras": [{}]}), 400, "either the id")
    refusal(
        client.post("/v1/images", json=draw | {"loras": [{"id": "0" * 64}]}), 404, "no LoRA 0000"
    )
    broken = base64.b64encode(b"not a file").decode()
    refusal(
        client.post("/v1/images", json=draw | {"loras": [{"content": broken}]}),
        400,
        "not a safetensors file",
    )
    refusal(
        client.post("/v1/images", json=draw | {"strategy": "composite"}),
        400,
        "needs at least one LoRA",
    )
    refusal(
        client.post("/v1/images", json=draw | {"prompt": "<lora:x>"}), 400, "no folder of LoRAs"
    )


def test_deadline_and_full_queue(serving: Callable[..., TestClient]) -> None:
    client = serving(deadline=0.3, queue=1)
    slow = send(client, headers={"Prefer": "respond-async"}, refine=60)
    time.sleep(0.3)
    refusal(send(client), 504, "longer than 0.3 s")
    waiting = [send(client, headers={"Prefer": "respond-async"}, refine=2) for _ in range(2)]
    time.sleep(0.3)
    states = [client.get(w.headers["location"]).json() for w in waiting]
    assert any("requests are waiting already" in (s["error"] or "") for s in states)
    client.delete(slow.headers["location"])
