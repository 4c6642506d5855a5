"""Work that costs too much or that nobody waits for any more; long work that lets others in."""

import asyncio
import time
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from hyperlora.pipelines.config import GenerationConfig
from hyperlora.service.engine.batcher import (
    DeadlineExceededError,
    OwnerQueueFullError,
    ServerStoppingError,
)
from hyperlora.service.engine.edits import EditEngine
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.engine.requests import (
    EditImageRequest,
    EngineRequest,
    ImageRequest,
    ImageSampling,
    LoraRequest,
)
from hyperlora.service.settings import EngineLimits
from tests.service.conftest import Models, StartClient, assert_problem, make_photo, post_photos

NUM_STEPS = 50
SAMPLING = ImageSampling(num_inference_steps=NUM_STEPS, width=64, height=64)
LONG_REQUESTS: list[EngineRequest[Any]] = [
    ImageRequest("a", sampling=SAMPLING),
    EditImageRequest(make_photo(), instruction="a hat", num_inference_steps=NUM_STEPS),
    LoraRequest([make_photo()], GenerationConfig(refine_steps=NUM_STEPS)),
]


class CountedSteps:
    """The calls of the denoisers of an engine."""

    def __init__(self, engine: LocalEngine) -> None:
        assert engine.edit_engine is not None
        bases = (engine.lora_engine.base, engine.edit_engine.base)
        self.num_calls = 0
        self.handles = [base.denoiser.register_forward_hook(self._count) for base in bases]

    def _count(self, *_: object) -> None:
        self.num_calls += 1

    async def wait_for(self, num_calls: int) -> None:
        """Wait until the denoisers have been called so often."""
        while self.num_calls < num_calls:
            await asyncio.sleep(0.002)


@pytest.fixture
def engine(models: Models, edit_engine: EditEngine) -> Iterator[LocalEngine]:
    engine = LocalEngine(*models, edit_engine=edit_engine)
    yield engine
    engine.close(0.0)


@pytest.fixture
def steps(engine: LocalEngine) -> Iterator[CountedSteps]:
    steps = CountedSteps(engine)
    yield steps
    for handle in steps.handles:
        handle.remove()


@pytest.mark.parametrize("request_", LONG_REQUESTS, ids=lambda request: type(request).__name__)
def test_work_ends_between_steps_when_its_caller_leaves(
    engine: LocalEngine, steps: CountedSteps, request_: EngineRequest[Any]
) -> None:
    async def leave() -> None:
        task = asyncio.create_task(engine.run(request_, 60))
        await steps.wait_for(3)
        task.cancel()
        await asyncio.sleep(0.01)
        num_calls = steps.num_calls
        quick = replace(SAMPLING, num_inference_steps=1)
        await engine.run(ImageRequest("b", sampling=quick), 60, owner="other")
        assert steps.num_calls <= num_calls + 5 < NUM_STEPS

    asyncio.run(leave())


def test_work_ends_between_steps_at_its_deadline(engine: LocalEngine, steps: CountedSteps) -> None:
    sampling = replace(SAMPLING, width=256, height=256)
    with pytest.raises(DeadlineExceededError):
        asyncio.run(engine.run(ImageRequest("a", sampling=sampling), 0.2))
    assert 0 < steps.num_calls < NUM_STEPS


def test_work_ends_between_steps_when_the_engine_closes(
    engine: LocalEngine, steps: CountedSteps
) -> None:
    async def close() -> list[object]:
        requests = [
            engine.run(request, 60, owner=str(i)) for i, request in enumerate(LONG_REQUESTS)
        ]
        tasks = [asyncio.create_task(request) for request in requests]
        await steps.wait_for(3)
        start_time = time.perf_counter()
        await asyncio.to_thread(engine.close, 0.0)
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert time.perf_counter() - start_time < 5
        return list(errors)

    for error in asyncio.run(close()):
        assert isinstance(error, ServerStoppingError)


def test_refinements_let_others_in_and_are_not_changed_by_them(engine: LocalEngine) -> None:
    request = LoraRequest([make_photo()], GenerationConfig(refine_steps=12))
    short = LoraRequest([make_photo(50)] * 2, GenerationConfig(refine_steps=2))  # no shared batch
    ends: list[str] = []

    async def run(name: str, request: EngineRequest[Any], owner: str) -> bytes:
        result = await engine.run(request, 60, owner=owner)
        ends.append(name)
        value: bytes = result.value
        return value

    async def run_together() -> list[bytes]:
        tasks = [asyncio.create_task(run("long", request, "alice"))]
        await asyncio.sleep(0.05)
        tasks.append(asyncio.create_task(run("short", short, "bob")))
        image = ImageRequest("a", sampling=replace(SAMPLING, num_inference_steps=2))
        tasks.append(asyncio.create_task(run("image", image, "carol")))
        return await asyncio.gather(*tasks)

    alone = asyncio.run(run("alone", request, "alice"))
    short_alone = asyncio.run(run("alone", short, "bob"))
    together = asyncio.run(run_together())
    assert ends[-1] == "long", "what is short does not wait for what is long"
    assert together[:2] == [alone, short_alone]


def test_engine_limits_what_waits_of_one_owner(models: Models) -> None:
    engine = LocalEngine(*models, limits=EngineLimits(max_queue_size_per_owner=2))

    async def send_many() -> list[object]:
        request = LoraRequest([make_photo()], GenerationConfig(refine_steps=4))
        tasks = [engine.run(request, 60, owner="alice") for _ in range(5)]
        tasks += [engine.run(request, 60, owner="bob")]
        return await asyncio.gather(*tasks, return_exceptions=True)

    *alices, bobs = asyncio.run(send_many())
    engine.close(0.0)
    assert any(isinstance(answer, OwnerQueueFullError) for answer in alices)
    assert not isinstance(bobs, Exception)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"width": 1024, "height": 1024, "num_inference_steps": 17}, "17 steps of 1024×1024"),
        ({"width": 1024, "height": 512, "num_inference_steps": 50}, "at most 16.8 million"),
        ({"width": 1024, "height": 1024, "num_inference_steps": 1}, "one step of 1024×1024"),
    ],
)
def test_generate_image_refuses_what_costs_too_much(
    client: TestClient, options: dict[str, int], sentence: str
) -> None:
    assert_problem(client.post("/v1/images", json={"prompt": "a"} | options), 400, sentence)


def test_pixel_limits_follow_the_settings_and_spare_the_default_image(
    start_client: StartClient,
) -> None:
    client = start_client(max_pixel_steps=1, max_batch_pixels=128 * 64)
    model, *_ = client.get("/v1/models").json()
    assert model["max_pixel_steps"] == 20 * model["resolution"] ** 2
    assert client.post("/v1/images", json={"prompt": "a"}).status_code == 200
    body = {"prompt": "a", "num_inference_steps": 50}
    assert_problem(client.post("/v1/images", json=body), 400, "ask for fewer steps")
    budget = client.app.state.service.engine.image_engine.budget  # type: ignore[attr-defined]
    assert [budget.compute_batch_size(*size) for size in ((64, 64), (128, 128))] == [2, 1]
    lora = {"content": b64encode(post_photos(client).content).decode()}
    composition = {"strategy": "composite", "loras": [lora] * 2, "num_inference_steps": 20}
    body = {"prompt": "a"} | composition
    assert client.post("/v1/images", json=body).status_code == 200
    assert_problem(
        client.post("/v1/images", json=body | {"num_inference_steps": 21}), 400, "each 2 times"
    )
