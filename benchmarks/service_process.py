"""A server process for benchmarks of the service, with its memory and processor time."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

API_KEY = "a-right-key-0123456"
"""Key of servers that are started with ``write_key_file``."""


@contextmanager
def start_server(*options: str) -> Iterator[tuple[str, int]]:
    """Start a server on a free port and stop it at the end.

    Args:
        options: Further options of ``hyperlora serve``.

    Yields:
        URL and process id, once the server is ready.
    """
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    executable = str(Path(sys.executable).with_name("hyperlora"))
    with tempfile.TemporaryDirectory() as state_dir, open(os.devnull, "w") as devnull:
        command = [executable, "serve", "--port", str(port), "--state-dir", state_dir]
        command += ["--rate-limit", "1000000/minute", *options]
        process = subprocess.Popen(command, stderr=devnull)
        try:
            _wait_until_ready(url)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def write_key_file() -> Iterator[str]:
    """Write ``API_KEY`` to a temporary file and yield its path."""
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(API_KEY)
        file.flush()
        yield file.name


def get_memory_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    resident = next(line for line in lines if line.startswith("VmRSS"))
    return int(resident.split()[1]) / 1024


def get_group_memory_mib(pid: int) -> float:
    """Return the memory of a process and of all its descendants in MiB; shared pages count once."""
    parents = {int(path.name): _read_parent(path) for path in Path("/proc").glob("[0-9]*")}
    group = {pid}
    while children := {child for child, parent in parents.items() if parent in group} - group:
        group |= children
    return sum(map(_get_proportional_memory_mib, group))


def _read_parent(folder: Path) -> int:
    try:
        return int((folder / "stat").read_text().rsplit(") ", 1)[1].split()[1])
    except OSError:  # it has ended
        return 0


def _get_proportional_memory_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024


def get_cpu_time_s(pid: int) -> float:
    """Return the processor time of a process in seconds, over all cores."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _wait_until_ready(url: str, num_attempts: int = 600) -> None:
    """Poll ``/readyz`` until it answers."""
    for _ in range(num_attempts):
        try:
            if httpx.get(url + "/readyz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
