"""Replicas by Ray Serve: the same routes, and no request lost with a replica."""

import asyncio
import logging
import os
import signal
import socket
import tempfile
from base64 import b64encode
from pathlib import Path

import diffusers
import httpx
import pytest
from typer.testing import CliRunner

from hyperlora.cli import app as cli
from hyperlora.lora.io.load import load_lora
from hyperlora.service.app import create_app
from hyperlora.service.engine.factory import ModelPaths, make_engine_factory
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.engine.requests import ImageRequest, ImageSampling
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


@pytest.mark.heavy
def test_ray_keeps_no_word_of_a_caller(bundle: Bundle) -> None:
    """Neither in its own logs, while the server runs, nor anywhere after it."""
    pytest.importorskip("ray")
    word = "pelargonium"
    with tempfile.TemporaryDirectory() as folder:  # a short path, as Ray needs
        state_dir = Path(folder) / "s"
        with (
            run_server(bundle, state_dir, "--ray", "--no-ui") as (url, _),
            httpx.Client(base_url=url, timeout=120) as client,
        ):
            body = {"prompt": f"{word} " * 80, "num_inference_steps": 1, "width": 64, "height": 64}
            assert client.post("/v1/images", json=body).status_code == 200
            lora = {"content": b64encode(word.encode()).decode()}
            refused = client.post("/v1/images", json=body | {"loras": [lora]})
            assert refused.status_code == 400
            fields = {"title": word, "refine_steps": 1}
            response = client.post("/v1/loras", files={"photos": make_photo()}, data=fields)
            assert response.status_code == 200
            ray_dir = state_dir / "ray"
            assert ray_dir.stat().st_mode & 0o077 == 0
            logs = [path for path in ray_dir.rglob("*") if path.is_file()]
            assert {".err", ".log"} <= {path.suffix for path in logs}
            assert not [path for path in logs if word.encode() in path.read_bytes()]
        assert word not in (state_dir / "log").read_text()
        assert not ray_dir.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize("max_bytes", [1000, 0])
def test_ray_logs_where_no_other_user_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int
) -> None:
    pytest.importorskip("ray")
    from hyperlora.service import ray_deployment

    monkeypatch.setattr(ray_deployment, "_MAX_TEMP_DIR_BYTES", max_bytes)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old_log = tmp_path / "state" / "ray" / "ray" / "worker.err"
    old_log.parent.mkdir(parents=True)
    old_log.write_text("of a killed server")
    with ray_deployment.make_ray_temp_dir(tmp_path / "state") as folder:
        assert folder.is_relative_to(tmp_path / "state") == (max_bytes > 0)
        assert not folder.exists() and folder.parent.stat().st_mode & 0o077 == 0
        folder.mkdir(mode=0o777)
        (folder / "worker.err").touch()
    assert not folder.parent.exists()


def test_models_log_no_prompts(bundle: Bundle, tmp_path: Path) -> None:
    """Whoever loads the models: a server, or a replica in a process of its own."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    diffusers.utils.logging.set_verbosity_warning()
    diffusers.utils.logging.add_handler(handler)
    paths = ModelPaths(model=str(bundle.model), base=str(bundle.base), enable_edits=False)
    engine = make_engine_factory(paths, ServiceSettings(tmp_path))(lambda kind, size: None)
    sampling = ImageSampling(num_inference_steps=1, width=64, height=64)
    prompt = "a secret word " * 60
    asyncio.run(engine.run(ImageRequest(prompt=prompt, sampling=sampling), 60))
    engine.close(5)
    diffusers.utils.logging.remove_handler(handler)
    assert not [message for message in messages if "secret" in message]


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
