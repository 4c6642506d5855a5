"""A server process that is killed, and started again over the same state."""

import time
from pathlib import Path

import httpx
import pytest

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
