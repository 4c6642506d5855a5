"""Replicas by Ray Serve: the same routes, and no request lost with a replica."""

import asyncio
import os
import signal
import socket
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from hyperlora.cli import app as cli
from hyperlora.lora.io.load import load_lora
from hyperlora.service.app import create_app
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.settings import ServiceSettings
from tests.conftest import Bundle
from tests.service.conftest import Models, make_photo, run_server

NUM_CLIENTS, REQUESTS_PER_CLIENT = 8, 2


def list_replicas(server_pid: int) -> list[int]:
    """Process ids of the replicas that descend from a server process."""
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and "ServeReplica:hyperlora:Models" in _read_command_line(
            folder
        ):
            parent = int(folder.name)
            while parent not in (0, 1, server_pid):
                parent = int(
                    (Path("/proc") / str(parent) / "stat").read_text().rsplit(") ", 1)[1].split()[1]
                )
            pids += [int(folder.name)] if parent == server_pid else []
    return pids


def _read_command_line(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@pytest.mark.heavy
def test_ray_engine_repeats_requests_of_a_dead_replica(
    bundle: Bundle, models: Models, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    with run_server(bundle, tmp_path, "--ray", "--replicas", "2") as (url, server):
        local_app = create_app(
            lambda on_batch: LocalEngine(*models, on_batch=on_batch),
            ServiceSettings(state_dir=tmp_path / "x"),
        )
        answers = asyncio.run(_kill_under_load(url, server.pid))
        with httpx.Client(base_url=url, timeout=120) as client:
            assert client.get("/openapi.json").json() == local_app.openapi()
            prefer = {"Prefer": "respond-async"}
            job = client.post(
                "/v1/loras",
                files={"photos": make_photo()},
                data={"refine_steps": 3},
                headers=prefer,
            )
            assert "event: succeeded" in client.get(job.headers["location"] + "/events").text
            refused = client.post("/v1/loras", files={"photos": b"no photo"})
        assert (refused.status_code, refused.json()["status"]) == (415, 415)
        assert "image was expected" in refused.json()["detail"]
    assert [answer.status_code for answer in answers] == [200] * NUM_CLIENTS * REQUESTS_PER_CLIENT
    assert "a replica died over a LoraRequest" in (tmp_path / "log").read_text(), (
        "the kill hit no request"
    )
    for answer in answers:
        assert (
            load_lora(answer.content, models.model.layout).weights.compute_delta_norms().max() > 0
        )


async def _kill_under_load(url: str, server_pid: int) -> list[httpx.Response]:
    """Kill a replica under the requests of ``NUM_CLIENTS``; return the answers."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        answers: list[httpx.Response] = []

        async def send_requests(client_index: int) -> None:
            for i in range(REQUESTS_PER_CLIENT):
                files = {"photos": make_photo(client_index * 10 + i)}
                answers.append(
                    await client.post("/v1/loras", files=files, data={"refine_steps": 5})
                )

        requests = asyncio.gather(*(send_requests(i) for i in range(NUM_CLIENTS)))
        replica_pids = list_replicas(server_pid)
        while len(answers) < 2:  # then both replicas are at work
            await asyncio.sleep(0.01)
        os.kill(replica_pids[0], signal.SIGKILL)
        await requests
        assert len(replica_pids) == 2
        return answers


@pytest.mark.heavy
def test_build_application_serves_the_same_routes(
    bundle: Bundle, models: Models, tmp_path: Path
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
    args = {
        "model": str(bundle.model),
        "base": str(bundle.base),
        "enable_edits": False,
        "state": str(tmp_path / "state"),
    }
    ray.init(log_to_driver=False, **make_local_cluster_options(ScaleConfig()))
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_application(args), name="deployed")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            local_app = create_app(
                lambda on_batch: LocalEngine(*models, on_batch=on_batch),
                ServiceSettings(tmp_path / "x"),
            )
            assert client.get("/openapi.json").json() == local_app.openapi()
            assert client.get("/readyz").json()["status"] == "ready"
            response = client.post("/v1/loras", files={"photos": make_photo()})
            assert (
                load_lora(response.content, models.model.layout).weights.compute_delta_norms().max()
                > 0
            )
            job = client.post(
                "/v1/loras", files={"photos": make_photo()}, headers={"Prefer": "respond-async"}
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
def test_serve_refuses_impossible_replicas(options: list[str], sentence: str) -> None:
    refused = CliRunner().invoke(cli, ["serve", *options])
    assert refused.exit_code == 2
    assert sentence in refused.output
