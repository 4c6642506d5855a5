"""The commands as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hyperlora.cli import app

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class CommandResult:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


@pytest.fixture
def run() -> Callable[..., CommandResult]:
    """Run a command in this process: ``run("inspect", file)``; bugs raise."""

    def run_command(*arguments: Any) -> CommandResult:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return CommandResult(result.exit_code, result.stdout, result.stderr)

    return run_command


@pytest.fixture
def run_process() -> Callable[..., CommandResult]:
    """Run a command in a process of its own, through the console entry point."""

    def run_command(*arguments: Any, final_code: str = "") -> CommandResult:
        program = (
            "import sys\nfrom hyperlora.cli import main\n"
            f"try: main()\nfinally:\n  pass\n  {final_code}"
        )
        process = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        return CommandResult(process.returncode, process.stdout, process.stderr)

    return run_command
