"""Two callers of one server: neither sees, deletes or learns of what the other stores."""

import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.conftest import Bundle
from tests.service.conftest import make_photo, run_server

KEYS = ("alices-key-0123456", "bobs-key-012345678")
UNKNOWN_FILE, UNKNOWN_JOB = "0" * 64, "0" * 32
NUM_TIMINGS = 60


class Callers(NamedTuple):
    """Clients of two keys."""

    alice: httpx.Client
    bob: httpx.Client


@pytest.fixture(scope="module")
def callers(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callers]:
    state_dir = tmp_path_factory.mktemp("state")
    key_file = state_dir / "keys"
    key_file.write_text("\n".join(KEYS))
    with ExitStack() as stack:
        url, _ = stack.enter_context(run_server(bundle, state_dir, "--api-key-file", str(key_file)))
        clients = [httpx.Client(base_url=url, timeout=60) for _ in KEYS]
        for client, key in zip(clients, KEYS, strict=True):
            stack.enter_context(client)
            client.headers["X-API-Key"] = key
        yield Callers(*clients)


def store_lora(client: httpx.Client, shade: int, **headers: str) -> httpx.Response:
    """Store the LoRA of a photo; the same photo gives the same file."""
    files = {"photos": make_photo(shade)}
    data = {"store": "true", "title": "me"}
    return client.post("/v1/loras", files=files, data=data, headers=headers)


def run_job(client: httpx.Client, path: str, **options: object) -> dict[str, str]:
    """Run a job to its end; return it."""
    headers = {"Prefer": "respond-async"}
    location = client.post(path, headers=headers, **options).headers["location"]  # type: ignore[arg-type]
    assert "event: succeeded" in client.get(f"{location}/events").text
    job: dict[str, str] = client.get(location).json()
    return job


def describe(response: httpx.Response) -> tuple[int, str, dict[str, str]]:
    """Describe all of an answer but ids, its time and its length."""
    hide_ids = re.compile(r"[0-9a-f]{32,}")
    headers = {k: hide_ids.sub("ID", v) for k, v in response.headers.items() if k != "date"}
    text = hide_ids.sub("ID", response.text) if response.is_error else ""
    return response.status_code, text, headers


@pytest.mark.heavy
def test_nobody_sees_or_deletes_files_and_jobs_of_others(callers: Callers) -> None:
    alice, bob = callers
    lora_path = f"/v1/loras/{store_lora(alice, 1).headers['etag'][1:-1]}"
    body = {"prompt": "a", "num_inference_steps": 1, "width": 64, "height": 64}
    image_job = run_job(alice, "/v1/images", json=body)
    lora_job = run_job(alice, "/v1/loras", files={"photos": make_photo(2)})
    paths = {
        lora_path: f"/v1/loras/{UNKNOWN_FILE}",
        lora_job["result"]: f"/v1/loras/{UNKNOWN_FILE}",
        image_job["result"]: f"/v1/images/{UNKNOWN_FILE}",
        f"/v1/jobs/{lora_job['id']}": f"/v1/jobs/{UNKNOWN_JOB}",
        f"/v1/jobs/{image_job['id']}/events": f"/v1/jobs/{UNKNOWN_JOB}/events",
    }
    for path, unknown_path in paths.items():
        for method in ("GET", "HEAD", "DELETE"):
            etag = {"If-None-Match": f'"{path.rsplit("/", 1)[1]}"'}
            refused = bob.request(method, path, headers=etag)
            assert describe(refused) == describe(bob.request(method, unknown_path, headers=etag))
            assert refused.status_code in {404, 405}
    negative = body | {"negative_lora": {"id": lora_path.rsplit("/", 1)[1]}}
    lora = body | {"loras": [{"id": lora_path.rsplit("/", 1)[1]}]}
    for request in (negative, lora):
        unknown = json.loads(json.dumps(request).replace(lora_path.rsplit("/", 1)[1], UNKNOWN_FILE))
        answers = [bob.post("/v1/images", json=data) for data in (request, unknown)]
        assert describe(answers[0]) == describe(answers[1])
        assert answers[0].status_code == 404
    for path in paths:
        assert alice.get(path).status_code == 200


@pytest.mark.heavy
def test_nobody_learns_what_others_store(callers: Callers) -> None:
    """Also not by storing the same: statuses, headers and times are those of a new file."""
    alice, bob = callers
    digest = store_lora(alice, 10).headers["etag"]
    new, known = store_lora(bob, 11), store_lora(bob, 10)
    assert known.headers["etag"] == digest
    assert describe(known) == describe(new)
    assert bob.delete(f"/v1/loras/{digest[1:-1]}").status_code == 204
    assert alice.get(f"/v1/loras/{digest[1:-1]}").status_code == 200

    def get(id: str) -> Callable[[], object]:
        return lambda: bob.get(f"/v1/loras/{id}")

    def store(shade: int) -> Callable[[], object]:
        return lambda: store_lora(bob, shade)

    for i in range(100, 110):
        store_lora(alice, i)
    assert compare_times([get(digest[1:-1])] * NUM_TIMINGS, [get(UNKNOWN_FILE)] * NUM_TIMINGS) < 1.5
    known_calls, new_calls = map(store, range(100, 110)), map(store, range(130, 140))
    assert compare_times(list(known_calls), list(new_calls)) < 1.5


def compare_times(calls: list[Callable[[], object]], others: list[Callable[[], object]]) -> float:
    """Compare the median seconds of two kinds of calls, made in turn; the larger ratio."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in zip(calls, others, strict=True):
        for times, call in zip(seconds, pair, strict=True):
            start_time = time.perf_counter()
            call()
            times.append(time.perf_counter() - start_time)
    ratio = statistics.median(seconds[0]) / statistics.median(seconds[1])
    return max(ratio, 1 / ratio)


@pytest.mark.heavy
def test_nobody_finds_files_of_others_on_the_page(callers: Callers) -> None:
    """The same file under another name does not lead to those of others."""
    alice, bob = callers
    for client, key in zip(callers, KEYS, strict=True):
        client.post("/sign-in", data={"key": key})
    upload = {"files": ("alice.png", make_photo(), "image/png")}
    own_upload = {"files": ("bob.png", make_photo(), "image/png")}
    path = Path(alice.post("/gradio_api/upload", files=upload).json()[0])
    own_path = Path(bob.post("/gradio_api/upload", files=own_upload).json()[0])
    assert alice.get(f"/gradio_api/file={path}").content == make_photo()
    assert own_path.parent != path.parent
    assert bob.get(f"/gradio_api/file={own_path.with_name(path.name)}").status_code == 403
    again = Path(bob.post("/gradio_api/upload", files=upload).json()[0])
    assert again != path
