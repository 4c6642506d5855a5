"""Run a hub's own ``model.py`` ("Diffusion Template") in a guarded process and get its LoRA.

The code runs only after consent to its digest. The process has no network, no environment, no
children; it reads libraries and its own folder, writes one temporary folder, and has limits of time
and memory. Where ``bwrap`` or ``unshare`` is installed, the kernel closes the network, too.

This stops mistakes and simple malice. It is no prison for code that attacks Python itself: for code
that nobody has read, run the whole command in a container.
"""

import atexit
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from PIL import Image

from hyperlora.errors import InvalidArgumentError, ModelLoadError, OutOfMemoryError

REPORT_NAME: Final = "report.json"
LORA_NAME: Final = "lora.safetensors"
MIN_DIGEST_LENGTH: Final = 12
"""Hexadecimal digits of a digest that count as consent."""
MAX_PROCESSES: Final = 1
"""Templates that run at a time, each with its own gigabytes; others wait for their turn."""
_slots: Final = threading.BoundedSemaphore(MAX_PROCESSES)
_running: Final[set["subprocess.Popen[bytes]"]] = set()
_MEMORY_PHRASES: Final = ("more memory", "not enough memory", "can't allocate", "bad_alloc")


@dataclass(frozen=True)
class SandboxLimits:
    """What one run of a template may use.

    Attributes:
        seconds: Time after which the process is ended.
        memory_bytes: Private memory of the process.
    """

    seconds: float = 900.0
    memory_bytes: int = 16 << 30


def compute_code_digest(model_dir: Path) -> str:
    """Compute the SHA-256 of the ``model.py`` of a folder."""
    return hashlib.sha256((model_dir / "model.py").read_bytes()).hexdigest()


def require_consent(model_dir: Path, name: str, consent: str | None) -> str:
    """Check that the user agreed to run exactly this code.

    Args:
        model_dir: The folder with ``model.py``.
        name: What the user called the model, for the message.
        consent: The digest that the user gave, or its first 12 or more digits.

    Returns:
        The whole digest.

    Raises:
        ModelLoadError: There is no consent, or it is for other code.
    """
    digest = compute_code_digest(model_dir)
    if consent is None:
        raise ModelLoadError(
            f"{name} runs code of its own, {model_dir / 'model.py'}: read it, and agree with "
            f"--trust-remote-code {digest}"
        )
    if len(consent) < MIN_DIGEST_LENGTH or not digest.startswith(consent.lower()):
        raise ModelLoadError(
            f"--trust-remote-code {consent} is not the SHA-256 of {model_dir / 'model.py'}, "
            f"which is {digest}: read what changed before you agree"
        )
    return digest


def run_template(
    model_dir: Path,
    digest: str,
    images: Sequence[Image.Image],
    limits: SandboxLimits | None = None,
) -> bytes:
    """Run a template on pictures.

    Args:
        model_dir: The folder with ``model.py`` and its weights.
        digest: The SHA-256 of ``model.py`` to which the user agreed.
        images: The pictures, in RGB.
        limits: Limits of time and memory.

    Returns:
        A safetensors file with the LoRA, in the template's own spelling.

    Raises:
        ModelLoadError: The template did what it must not, failed, or returned no LoRA.
        OutOfMemoryError: The template needs more memory than the limit.
        InvalidArgumentError: There is no picture.
    """
    if not images:
        raise InvalidArgumentError("a template needs at least one picture")
    limits = limits or SandboxLimits()
    with tempfile.TemporaryDirectory(prefix="hyperlora-template-") as temporary:
        work_dir = Path(temporary)
        names = [f"image-{index}.png" for index in range(len(images))]
        for image, name in zip(images, names, strict=True):
            image.convert("RGB").save(work_dir / name)
        request = {
            "model_dir": str(model_dir.resolve()),
            "sha256": digest,
            "images": names,
            "max_memory_bytes": limits.memory_bytes,
        }
        (work_dir / "request.json").write_text(json.dumps(request), encoding="utf-8")
        with _slots:
            log = _run_process(work_dir, limits, model_dir)
        return _read_result(work_dir, log, model_dir)


def _run_process(work_dir: Path, limits: SandboxLimits, model_dir: Path) -> str:
    """Run the guarded process; returns what it printed."""
    command = [
        *_make_isolation(work_dir),
        sys.executable,
        "-I",
        "-B",  # else the first import of a library writes its bytecode, which the guard forbids
        "-m",
        "hyperlora.pipelines.released.template_process",
        str(work_dir / "request.json"),
    ]
    log_path = work_dir / "log.txt"
    with log_path.open("wb") as log_file:
        process = subprocess.Popen(
            command,
            cwd=work_dir,
            env=_make_environment(work_dir),
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _running.add(process)
        try:
            process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            raise ModelLoadError(
                f"{model_dir / 'model.py'} did not end within {limits.seconds:g} s and was stopped"
            ) from None
        finally:
            process.kill()
            process.wait()
            _running.discard(process)
    return log_path.read_text(encoding="utf-8", errors="replace")


@atexit.register
def _kill_running() -> None:
    """End processes for which a daemon thread still waits when this program ends."""
    for process in list(_running):
        process.kill()


def _read_result(work_dir: Path, log: str, model_dir: Path) -> bytes:
    """The LoRA of an ended process, or the error that its report names."""
    code_path = model_dir / "model.py"
    try:
        report = json.loads((work_dir / REPORT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = {}
    if "refused" in report:
        raise ModelLoadError(f"{code_path} was stopped: it {report['refused']}")
    if "error" in report:
        reason = " ".join(str(report["error"]).split())
        if any(phrase in reason for phrase in _MEMORY_PHRASES):
            raise OutOfMemoryError(f"{code_path} needs more memory than it may use: {reason}")
        raise ModelLoadError(f"{code_path} failed: {reason}")
    if "ok" not in report:
        last_line = (log.strip().splitlines() or ["no output"])[-1][:300]
        raise ModelLoadError(f"{code_path} ended without a result: {last_line}")
    return (work_dir / LORA_NAME).read_bytes()


def _make_environment(work_dir: Path) -> dict[str, str]:
    """Environment of the process: no tokens, no home, no accelerator, no hub."""
    return {
        "PATH": os.defpath,
        "HOME": str(work_dir),
        "TMPDIR": str(work_dir),
        "LANG": "C.UTF-8",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **{key: os.environ[key] for key in ("OMP_NUM_THREADS", "SYSTEMROOT") if key in os.environ},
    }


def _make_isolation(work_dir: Path) -> list[str]:
    """Make the command that closes network and files in the kernel, where the system has one."""
    tool = _find_isolation_tool()
    if tool == "bwrap":
        folders = ["--ro-bind", "/", "/", "--bind", str(work_dir), str(work_dir)]
        devices = ["--dev", "/dev", "--proc", "/proc"]
        return [tool, *folders, *devices, "--unshare-all", "--die-with-parent"]
    return [tool, "--map-root-user", "--net"] if tool == "unshare" else []


@cache
def _find_isolation_tool() -> str | None:
    """Find a program that makes namespaces; containers often forbid them to all programs."""
    trials = {
        "bwrap": ["bwrap", "--ro-bind", "/", "/", "--unshare-all", "true"],
        "unshare": ["unshare", "--map-root-user", "--net", "true"],
    }
    for tool, command in trials.items():
        if shutil.which(tool) and not subprocess.run(command, capture_output=True).returncode:
            return tool
    return None
