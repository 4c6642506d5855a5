"""A server process that is killed, and started again over the same state."""

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.conftest import photo, process

JOBS = 20


@pytest.mark.heavy
def test_every_accepted_job_is_done_or_reported_after_a_kill(bundle: Any, tmp_path: Path) -> None:
    """Photos live in memory only, so what was not done cannot be: it is reported, and nothing vanishes."""
    with (
        process(bundle, tmp_path) as (url, server),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        places = []
        for i in range(JOBS):
            files = {"photos": ("a.png", photo(i))}
            fields = {"refine": str(0 if i < 4 else 500), "title": f"job {i}"}
            accepted = client.post(
                "/v1/loras", files=files, data=fields, headers={"Prefer": "respond-async"}
            )
            assert accepted.status_code == 202
            places.append(accepted.headers["location"])
        until = time.monotonic() + 20
        while client.get(places[0]).json()["state"] != "succeeded" and time.monotonic() < until:
            time.sleep(0.05)
        server.kill()

    with process(bundle, tmp_path) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        jobs = [client.get(place).json() for place in places]
        states = [job["state"] for job in jobs]
        assert set(states) == {"succeeded", "failed"}, states
        for job in jobs:
            if job["state"] == "succeeded":
                assert client.get(job["result"]).status_code == 200
            else:
                assert "send it again" in job["error"]
                assert job["finished"] >= job["created"]
        files = {"photos": ("a.png", photo())}
        assert client.post("/v1/loras", files=files).status_code == 200
