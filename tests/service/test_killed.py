"""A server process that is killed, and started again over the same state."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from hyperlora.service.job_table import JobTable
from hyperlora.service.jobs import SERVER_STOPPED
from tests.conftest import Bundle
from tests.service.conftest import make_photo, run_server

NUM_JOBS = 20


@pytest.mark.heavy
def test_server_reports_every_accepted_job_after_a_kill(bundle: Bundle, tmp_path: Path) -> None:
    """Photos are in memory only, so an unfinished job cannot run again: it must be reported."""
    with (
        run_server(bundle, tmp_path) as (url, server),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        locations = []
        for i in range(NUM_JOBS):
            files = {"photos": ("a.png", make_photo(i))}
            fields = {"refine_steps": str(0 if i < 4 else 500), "title": f"job {i}"}
            accepted = client.post(
                "/v1/loras", files=files, data=fields, headers={"Prefer": "respond-async"}
            )
            assert accepted.status_code == 202
            locations.append(accepted.headers["location"])
        deadline = time.monotonic() + 20
        while (
            client.get(locations[0]).json()["state"] != "succeeded" and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        server.kill()

    with run_server(bundle, tmp_path) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        jobs = [client.get(location).json() for location in locations]
        states = [job["state"] for job in jobs]
        assert set(states) == {"succeeded", "failed"}, states
        for job in jobs:
            if job["state"] == "succeeded":
                assert client.get(job["result"]).status_code == 200
            else:
                assert "send it again" in job["error"]
                assert job["finished"] >= job["created"]
        files = {"photos": ("a.png", make_photo())}
        assert client.post("/v1/loras", files=files).status_code == 200


@pytest.mark.heavy
def test_server_ends_heavy_work_within_ten_seconds_of_sigterm(
    bundle: Bundle, tmp_path: Path
) -> None:
    """The steps of the image are as long as those of large models: nobody waits for one."""
    options = ("--max-pixel-steps", str(1 << 30), "--max-pixels", str(1 << 20))
    with (
        run_server(bundle, tmp_path, *options) as (url, server),
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor(1) as threads,
        ExitStack() as connections,
    ):
        upload = b"POST /v1/loras HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n"
        for _ in range(3):
            address = ("127.0.0.1", httpx.URL(url).port or 0)
            connection = connections.enter_context(socket.create_connection(address, 10))
            connection.sendall(upload + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b")
        files, fields = {"photos": ("a.png", make_photo())}, {"refine_steps": "500"}
        prefer = {"Prefer": "respond-async"}
        jobs = [
            client.post("/v1/loras", files=files, data=fields, headers=prefer) for _ in range(3)
        ]
        body = {"prompt": "a", "num_inference_steps": 50, "width": 1024, "height": 1024}
        image = threads.submit(client.post, "/v1/images", json=body)
        time.sleep(1)
        start_time = time.monotonic()
        server.terminate()
        server.wait(60)
        assert time.monotonic() - start_time < 10
        answer = image.result()
        assert answer.status_code == 503 and "the server is stopping" in answer.json()["detail"]

    table = JobTable(tmp_path / "jobs.sqlite")
    for job in jobs:
        found = table.get(job.json()["id"], "host 127.0.0.1")
        assert found is not None
        assert (found.state, found.error) == ("failed", SERVER_STOPPED)
