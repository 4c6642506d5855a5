"""Dockerfile and compose file fit each other and the command line. (`hadolint Dockerfile` is run where it is there.)"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from hyperlora.cli import app

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of every line, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()
    ]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]
    }
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)


def test_the_command_is_one_and_asks_for_keys() -> None:
    found = dict(instructions())
    command = [*json.loads(found["ENTRYPOINT"]), *json.loads(found["CMD"])]
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    parsed = serve.make_context("serve", command[2:], resilient_parsing=True).params
    assert command[:2] == ["hyperlora", "serve"]
    assert parsed["host"] == "0.0.0.0"
    assert str(parsed["state"]) == found["VOLUME"]
    secret = COMPOSE["services"]["hyperlora"]["secrets"][0]
    assert str(parsed["keys"]) == f"/run/secrets/{secret}" and secret in COMPOSE["secrets"]


def test_it_does_not_run_as_root() -> None:
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users and users[-1] not in ("root", "0")


def test_compose_gives_arguments_that_the_dockerfile_has() -> None:
    names = {rest.split("=")[0] for name, rest in instructions() if name == "ARG"}
    assert set(COMPOSE["services"]["hyperlora"]["build"]["args"]) == names
    assert COMPOSE["services"]["hyperlora"]["ports"] == ["127.0.0.1:8000:8000"], (
        "only the proxy is open to others"
    )
    volumes = {
        v.split(":")[0] for service in COMPOSE["services"].values() for v in service["volumes"]
    }
    assert volumes == set(COMPOSE["volumes"])


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint() -> None:
    found = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
