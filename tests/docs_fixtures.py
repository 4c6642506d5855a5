"""What the tests of the documentation share: a reader's folder and a server."""

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def make_reader_dir(path: Path) -> Path:
    """Make a folder like a fresh clone, to run commands in."""
    for name in ("checkpoints", "configs", "examples"):
        (path / name).symlink_to(ROOT / name)
    return path


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
