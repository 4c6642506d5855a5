"""The service on a mock of a CUDA card, and without enough memory."""

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from hyperlora.compute import ComputeConfig
from hyperlora.lora.io.load import load_lora
from hyperlora.ray_connection import compute_worker_gpus
from hyperlora.service.app import create_app
from hyperlora.service.engine import batcher
from hyperlora.service.engine.batcher import BatchSpec, DynamicBatcher
from hyperlora.service.engine.factory import ModelPaths, make_engine_factory
from hyperlora.service.settings import ServiceSettings
from tests.conftest import Bundle
from tests.mock_cuda import mock_cuda, use_mock_tensors
from tests.service.conftest import Models, assert_problem, make_photo, post_photos
from tests.service.test_edits import AFTER, BEFORE, post

OUT_OF_MEMORY = "the server ran out of memory over this request: ask for a smaller image"


@pytest.fixture
def card_client(
    bundle: Bundle, lora_diffusion_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TestClient]:
    """A server whose models are on the mock card."""
    try_batch = DynamicBatcher._try_batch

    def try_batch_on_card(self: DynamicBatcher, batch: Any) -> Exception | None:
        with use_mock_tensors():  # the model thread is another than that of the test
            return try_batch(self, batch)

    monkeypatch.setattr(DynamicBatcher, "_try_batch", try_batch_on_card)
    paths = ModelPaths(
        model=str(bundle.model),
        base=str(bundle.base),
        pair_model=str(bundle.pair_model),
        edit_base=str(bundle.edit_base),
        evaluator=str(bundle.evaluator),
        extra_models=(str(lora_diffusion_dir),),
    )
    settings = ServiceSettings(state_dir=tmp_path / "state", rate_limit="100000/minute")
    with mock_cuda():
        engine_factory = make_engine_factory(paths, settings, ComputeConfig(dtype="float32"))
        app = create_app(engine_factory, settings)
        with TestClient(app, base_url="http://localhost") as client:
            yield client


def test_every_route_runs_on_a_card(card_client: TestClient, client: TestClient) -> None:
    """As on a server on the CPU; the LoRAs and the similarity are the same."""
    models = card_client.get("/v1/models").json()
    assert [(m["device"], m["dtype"]) for m in models] == [("cuda:0", "float32")] * 3
    on_cpu = client.get("/v1/models").json()
    assert [(m["device"], m["dtype"]) for m in on_cpu] == [("cpu", "float32")] * 3
    lora = post_photos(client).content
    content = {"content": base64.b64encode(lora).decode()}
    sampling = {"prompt": "a b", "num_inference_steps": 2}
    photos = [("photos", make_photo(10)), ("images", make_photo(200))]
    pair = [("before", BEFORE), ("after", AFTER)]
    image = ("image", make_photo(60))
    loras, similarities = [], []
    for server in (card_client, client):
        answers = [
            post_photos(server),
            post_photos(server, refine_steps=2, rank=3),
            post_photos(server, method="lora-diffusion", seed=3),
            post(server, "/v1/loras", *pair),
            post(server, "/v1/edits", image, *pair, num_inference_steps=2),
            post(server, "/v1/edits", image, ("lora", lora), num_inference_steps=2),
            server.post("/v1/images", json=sampling),
            server.post("/v1/images", json=sampling | {"loras": [content, content]}),
            server.post("/v1/images", json=sampling | {"loras": [content], "gamma": 1.5}),
            server.post(
                "/v1/images", json=sampling | {"loras": [content] * 2, "strategy": "composite"}
            ),
            post(server, "/v1/identity-similarity", *photos),
        ]
        assert [answer.status_code for answer in answers] == [200] * len(answers), [
            answer.text[:200] for answer in answers if answer.status_code != 200
        ]
        loras.append([load_lora(answer.content).weights for answer in answers[:4]])
        similarities += answers[-1].json()["similarities"]
    for on_card, on_cpu_lora in zip(*loras, strict=True):
        for delta, expected in zip(
            on_card.get_delta_weights(), on_cpu_lora.get_delta_weights(), strict=True
        ):
            torch.testing.assert_close(delta, expected, atol=1e-3, rtol=1e-3)
    assert similarities[0] == pytest.approx(similarities[1], abs=1e-3)


def test_out_of_memory_answers_503_and_the_server_goes_on(
    client: TestClient, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    body = {"prompt": "a b", "num_inference_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(type(models.base.pipeline), "__call__", fail)
        assert_problem(client.post("/v1/images", json=body), 503, OUT_OF_MEMORY)
        job = client.post("/v1/images", json=body, headers={"Prefer": "respond-async"})
        assert OUT_OF_MEMORY in client.get(job.headers["location"] + "/events").text
    assert client.post("/v1/images", json=body).status_code == 200
    assert client.get("/readyz").status_code == 200


def test_a_batch_without_memory_runs_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(batcher, "empty_cache", lambda: emptied.append(1))
    release = threading.Event()

    def run_payloads(payloads: list[int]) -> list[int]:
        release.wait(5)
        if len(payloads) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return payloads

    dynamic_batcher = DynamicBatcher(10)
    spec = BatchSpec("x", run_payloads, max_batch_size=3)
    futures = [dynamic_batcher.submit(spec, i) for i in range(4)]
    release.set()
    assert [future.result(5) for future in futures] == [0, 1, 2, 3]
    assert emptied
    dynamic_batcher.close()


class FakeRay:
    """A connected cluster with some GPUs."""

    def __init__(self, num_gpus: int) -> None:
        self.resources = {"GPU": float(num_gpus)} if num_gpus else {}

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return self.resources


@pytest.mark.parametrize(
    ("num_gpus", "device", "num_workers", "expected"),
    [
        (0, "auto", 1, 0),
        (2, "cpu", 1, 0),
        (2, "auto", 1, 1),
        (2, "auto", 2, 1),
        (2, "cuda", 3, 0.5),
        (1, "auto", 4, 0.25),
        (3, "auto", 4, 0.5),
    ],
)
def test_workers_reserve_a_gpu_or_a_share_of_one(
    num_gpus: int, device: str, num_workers: int, expected: float
) -> None:
    ray: Any = FakeRay(num_gpus)
    assert compute_worker_gpus(ray, device, num_workers) == expected


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 0.5), ({"device": "cpu"}, 0), ({"num_gpus": 2}, 2)]
)
def test_replicas_reserve_gpus_by_their_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: float
) -> None:
    pytest.importorskip("ray")
    from hyperlora.service import ray_deployment

    ray = FakeRay(1)
    monkeypatch.setattr(ray_deployment.ray, "is_initialized", ray.is_initialized)
    monkeypatch.setattr(ray_deployment.ray, "cluster_resources", ray.cluster_resources)
    scale = ray_deployment.ScaleConfig(2, num_gpus=options.pop("num_gpus", None))
    application = ray_deployment.build_model_deployment(
        ModelPaths(), ServiceSettings(tmp_path), scale, options
    )
    deployment = application._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == expected
    (load_models,) = deployment.init_args
    assert load_models.args[-1] == options
