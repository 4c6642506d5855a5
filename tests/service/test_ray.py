"""Replicas by Ray Serve: the same routes, and no request lost with a replica."""

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from hyperlora.cli import app as cli
from hyperlora.lora.io.load import load_lora
from hyperlora.service.app import create_app
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.settings import ServiceSettings
from tests.service.conftest import photo, process

CLIENTS, EACH = 8, 2


def replicas(server: int) -> list[int]:
    """Process ids of the replicas that descend from ``start_server``."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and "ServeReplica:hyperlora:Models" in _title(folder):
            parent = int(folder.name)
            while parent not in (0, 1, server):
                parent = int(
                    (Path("/proc") / str(parent) / "stat").read_text().rsplit(") ", 1)[1].split()[1]
                )
            found += [int(folder.name)] if parent == server else []
    return found


def _title(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@pytest.mark.heavy
def test_no_request_is_lost_when_a_replica_dies(bundle: Any, models: Any, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with process(bundle, tmp_path, "--ray", "--replicas", "2") as (url, server):
        alone = create_app(
            lambda observe: LocalEngine(*models, on_batch=observe),
            ServiceSettings(state_dir=tmp_path / "x"),
        )
        answers = asyncio.run(_under_fire(url, server.pid))
        with httpx.Client(base_url=url, timeout=120) as client:
            assert client.get("/openapi.json").json() == alone.openapi()
            prefer = {"Prefer": "respond-async"}
            job = client.post(
                "/v1/loras", files={"photos": photo()}, data={"refine": 3}, headers=prefer
            )
            assert "event: succeeded" in client.get(job.headers["location"] + "/events").text
            refused = client.post("/v1/loras", files={"photos": b"no photo"})
        assert (refused.status_code, refused.json()["status"]) == (415, 415)
        assert "image was expected" in refused.json()["detail"]
    assert [answer.status_code for answer in answers] == [200] * CLIENTS * EACH
    assert "a replica died over a lora" in (tmp_path / "log").read_text(), "the kill hit nobody"
    for answer in answers:
        assert load_lora(answer.content, models[0].layout).weights.compute_delta_norms().max() > 0


async def _under_fire(url: str, server: int) -> list[httpx.Response]:
    """Answers to requests of ``CLIENTS`` at once, of which those in one replica lose it."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        answers: list[httpx.Response] = []

        async def caller(number: int) -> None:
            for i in range(EACH):
                files = {"photos": photo(number * 10 + i)}
                answers.append(await client.post("/v1/loras", files=files, data={"refine": 5}))

        callers = asyncio.gather(*(caller(i) for i in range(CLIENTS)))
        found = replicas(server)
        while len(answers) < 2:  # then both replicas are at work
            await asyncio.sleep(0.01)
        os.kill(found[0], signal.SIGKILL)
        await callers
        assert len(found) == 2
        return answers


@pytest.mark.heavy
def test_the_app_as_a_deployment_has_the_same_routes(
    bundle: Any, models: Any, tmp_path: Path
) -> None:
    """As Kubernetes runs it: behind Ray's proxy."""
    ray = pytest.importorskip("ray")
    from ray import serve

    from hyperlora.service.ray_deployment import (
        ScaleConfig,
        build_application,
        make_local_cluster_options,
    )

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    chosen = {
        "model": str(bundle.model),
        "base": str(bundle.base),
        "edits": False,
        "state": str(tmp_path / "state"),
    }
    ray.init(log_to_driver=False, **make_local_cluster_options(ScaleConfig()))
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_application(chosen), name="deployed")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            alone = create_app(
                lambda observe: LocalEngine(*models, on_batch=observe),
                ServiceSettings(tmp_path / "x"),
            )
            assert client.get("/openapi.json").json() == alone.openapi()
            assert client.get("/readyz").json()["status"] == "ready"
            made = client.post("/v1/loras", files={"photos": photo()})
            assert load_lora(made.content, models[0].layout).weights.compute_delta_norms().max() > 0
            job = client.post(
                "/v1/loras", files={"photos": photo()}, headers={"Prefer": "respond-async"}
            )
            assert "event: succeeded" in client.get(job.headers["location"] + "/events").text
            assert client.post("/v1/loras", files={"photos": b"no photo"}).status_code == 415
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--replicas", "2"], "add --ray"),
        (["--ray", "--replicas", "3", "--max-replicas", "2"], "below --replicas 3"),
    ],
)
def test_replicas_that_cannot_be(options: list[str], sentence: str) -> None:
    refused = CliRunner().invoke(cli, ["serve", *options])
    assert refused.exit_code == 2
    assert sentence in refused.output
