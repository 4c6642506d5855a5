"""The Dockerfile fits the command line, and the compose file fits the Dockerfile."""

import json
import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from typer.main import get_command

from hyperlora.cli import app
from hyperlora.service.app import create_app
from hyperlora.service.settings import ServiceSettings

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())


def list_instructions() -> list[tuple[str, str]]:
    """List the instructions of the Dockerfile with their arguments, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()
    ]


def test_dockerfile_copies_what_dockerignore_keeps() -> None:
    unignored = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    sources = {
        source
        for name, args in list_instructions()
        if name == "COPY"
        for source in args.split()[:-1]
    }
    assert sources == unignored
    assert all((ROOT / source).exists() for source in sources)


def test_dockerfile_command_requires_keys() -> None:
    instructions = dict(list_instructions())
    command = [*json.loads(instructions["ENTRYPOINT"]), *json.loads(instructions["CMD"])]
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    parsed = serve.make_context("serve", command[2:], resilient_parsing=True).params
    assert command[:2] == ["hyperlora", "serve"]
    assert parsed["host"] == "0.0.0.0"
    assert str(parsed["state_dir"]) == instructions["VOLUME"]
    secret = COMPOSE["services"]["hyperlora"]["secrets"][0]
    assert str(parsed["api_key_file"]) == f"/run/secrets/{secret}" and secret in COMPOSE["secrets"]


def test_dockerfile_runs_as_another_user_than_root() -> None:
    users = [args for name, args in list_instructions() if name == "USER"]
    assert users and users[-1] not in ("root", "0")


def test_compose_matches_the_dockerfile() -> None:
    names = {args.split("=")[0] for name, args in list_instructions() if name == "ARG"}
    assert set(COMPOSE["services"]["hyperlora"]["build"]["args"]) == names
    assert COMPOSE["services"]["hyperlora"]["ports"] == ["127.0.0.1:8000:8000"], (
        "only the proxy is reachable from other machines"
    )
    volumes = {
        v.split(":")[0] for service in COMPOSE["services"].values() for v in service["volumes"]
    }
    assert volumes == set(COMPOSE["volumes"])


def is_public(path: str) -> bool:
    """Whether the proxy of the compose file passes a path."""
    caddyfile = COMPOSE["configs"]["caddyfile"]["content"]
    (patterns,) = re.findall(r"@public path (.+)", caddyfile)
    return any(fnmatch(path, pattern) for pattern in patterns.split())


def test_compose_passes_the_api_alone(tmp_path: Path) -> None:
    app = create_app(Mock(), ServiceSettings(tmp_path))
    paths = [*app.openapi()["paths"], "/docs", "/redoc", "/openapi.json"]
    assert {"/metrics", "/healthz", "/readyz", "/v1/loras"} <= set(paths)
    for path in paths:
        assert is_public(path) == path.startswith("/v1/"), path
    config = next(entry["source"] for entry in COMPOSE["services"]["caddy"]["configs"])
    assert config in COMPOSE["configs"]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_dockerfile_passes_hadolint() -> None:
    result = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
