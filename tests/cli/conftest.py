"""The verbs as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hyperlora.cli import app

ROOT = Path(__file__).parents[2]


class Ran:
    """Exit code and what was said; ``files`` are those a failed run must not have made."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


@pytest.fixture
def run() -> Callable[..., Ran]:
    """In this process: ``run("inspect", file)``. A bug's exception is raised, as it would be a traceback."""

    def runner(*arguments: Any) -> Ran:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return runner


@pytest.fixture
def shell() -> Callable[..., Ran]:
    """In a process of its own, through the console entry point."""

    def runner(*arguments: Any, then: str = "") -> Ran:
        code = (
            f"import sys\nfrom hyperlora.cli import main\ntry: main()\nfinally:\n  pass\n  {then}"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return runner
