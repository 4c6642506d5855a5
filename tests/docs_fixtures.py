"""What the tests of the documentation share: a reader's folder, programs and a server."""

import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from diffusers import DPMSolverMultistepScheduler

ROOT = Path(__file__).parents[1]


def make_reader_dir(path: Path) -> Path:
    """Make a folder like a fresh clone, to run commands in."""
    for name in ("checkpoints", "configs", "examples"):
        (path / name).symlink_to(ROOT / name)
    return path


@pytest.fixture
def run_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a program of ``examples/`` in a reader's folder; return what it prints."""
    monkeypatch.chdir(make_reader_dir(tmp_path))

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", *arguments])
        runpy.run_path(sys.argv[0], run_name="__main__")
        return capsys.readouterr().out

    return run


def read_expected_output(name: str) -> list[str]:
    """Read the lines of output that the docstring of a program promises."""
    text = (ROOT / "examples" / f"{name}.py").read_text().split('"""')[1]
    lines = text.split("Expected output", 1)[1].splitlines()[1:]
    return [line.strip() for line in lines if line.startswith("    ")]


def remove_numbers(line: str) -> str:
    """Replace the numbers that differ between machines."""
    return re.sub(r"-?\d+(?:\.\d+)?", "N", line)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Denoise in at most four steps; the path through the code stays the same."""
    set_timesteps = DPMSolverMultistepScheduler.set_timesteps

    @wraps(set_timesteps)
    def set_few_timesteps(scheduler: Any, num_inference_steps: int, *args: Any, **kw: Any) -> None:
        set_timesteps(scheduler, min(num_inference_steps, 4), *args, **kw)

    monkeypatch.setattr(DPMSolverMultistepScheduler, "set_timesteps", set_few_timesteps)


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a `hyperlora serve` of the bundle."""
    state_dir = tmp_path_factory.mktemp("state")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    hyperlora = str(Path(sys.executable).with_name("hyperlora"))
    command = [hyperlora, "serve", "--port", str(port), "--state-dir", str(state_dir), "--no-ui"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{port}"
    for _ in range(1800):
        try:
            with urllib.request.urlopen(f"{url}/readyz"):
                break
        except OSError:
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            time.sleep(0.1)
    yield url
    process.terminate()
    assert process.wait(60) in (0, -signal.SIGTERM)  # uvicorn ends by the signal
