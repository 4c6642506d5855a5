"""A hub's own code: it runs after consent only, and what it must not do ends it."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from hyperlora.errors import InvalidArgumentError, ModelLoadError, OutOfMemoryError
from hyperlora.pipelines.released import template_sandbox
from hyperlora.pipelines.released.template_process import (
    build_model,
    collect_lora,
    import_libraries,
    load_template,
    load_weights,
)
from hyperlora.pipelines.released.template_sandbox import (
    SandboxLimits,
    _read_result,
    compute_code_digest,
    require_consent,
    run_template,
)
from tests.pipelines.released.tiny_template import HEAD, IMAGES, WEIGHT, make_template


def run(folder: Path, limits: SandboxLimits | None = None) -> dict[str, torch.Tensor]:
    return load(run_template(folder, compute_code_digest(folder), IMAGES, limits))


def test_template_returns_what_its_code_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = """
        import os, sys
        assert 'HF_TOKEN' not in os.environ and not torch.cuda.is_available()
        sys.path.append(os.path.dirname(__file__))
        import helper  # for the first time: no bytecode of it lies on the disk
        assert helper.NUMBER == 7
    """
    folder = make_template(tmp_path / "template", code)
    (folder / "helper.py").write_text("NUMBER = 7\n")
    tensors = run(folder)
    assert not (folder / "__pycache__").exists()
    mean = torch.tensor([0.6, 0.0, 0.6]) + 0.25  # the buffer is in no file
    expected = WEIGHT @ mean
    torch.testing.assert_close(
        tensors["layers.0.attention.to_q.lora_A.default.weight"][0], expected
    )
    torch.testing.assert_close(
        tensors["layers.0.attention.to_q.lora_B.default.weight"][:, 0], expected
    )


def test_nothing_runs_without_consent_to_this_code(tmp_path: Path) -> None:
    folder = make_template(tmp_path / "template")
    digest = compute_code_digest(folder)
    with pytest.raises(ModelLoadError, match=f"agree with --trust-remote-code {digest}"):
        require_consent(folder, "ORG/NAME", None)
    for consent in (digest[:11], "0" * 64, digest + "0"):
        with pytest.raises(ModelLoadError, match="is not the SHA-256"):
            require_consent(folder, "ORG/NAME", consent)
    assert require_consent(folder, "ORG/NAME", digest[:12].upper()) == digest
    (folder / "model.py").write_text(HEAD + "\n# changed\n")
    with pytest.raises(ModelLoadError, match=r"model\.py changed"):
        run_template(folder, digest, IMAGES)


def test_code_outside_of_functions_is_guarded(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="stopped: it opened a network connection"):
        run(make_template(tmp_path, head="import socket\nsocket.socket()\n"))


def test_failure_of_the_code_is_one_sentence(tmp_path: Path) -> None:
    folder = make_template(tmp_path, "raise ValueError('a reason\\nof two lines')")
    with pytest.raises(ModelLoadError, match="failed: ValueError: a reason of two") as error:
        run(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("report", "error_type", "message"),
    [
        ({"error": "SystemExit: 0"}, ModelLoadError, "failed: SystemExit"),
        ({"error": "RuntimeError: can't allocate memory"}, OutOfMemoryError, "more memory than"),
        ({"refused": "wrote /x"}, ModelLoadError, "was stopped: it wrote /x"),
        (None, ModelLoadError, "ended without a result: the last line"),
    ],
)
def test_every_end_of_the_process_is_named(
    tmp_path: Path, report: dict[str, str] | None, error_type: type[Exception], message: str
) -> None:
    if report is not None:
        (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(error_type, match=message):
        _read_result(tmp_path, "first\nthe last line\n", tmp_path)


def test_time_and_memory_are_limited(tmp_path: Path) -> None:
    endless = make_template(tmp_path / "endless", "while True: pass")
    with pytest.raises(ModelLoadError, match="did not end within 1 s and was stopped"):
        run(endless, SandboxLimits(seconds=1))
    greedy = make_template(tmp_path / "greedy", "kept = torch.ones(2 << 30)")
    with pytest.raises(OutOfMemoryError, match="more memory than it may use"):
        run(greedy, SandboxLimits(memory_bytes=4 << 30))


def test_one_template_runs_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lock = make_template(tmp_path), threading.Lock()
    held = list[Path]()

    def run_process(work_dir: Path, limits: SandboxLimits, model_dir: Path) -> str:
        with lock:
            assert not held, "another template runs"
            held.append(work_dir)
        time.sleep(0.05)
        (work_dir / "report.json").write_text('{"ok": ""}')
        (work_dir / "lora.safetensors").write_bytes(work_dir.name.encode())
        held.remove(work_dir)
        return ""

    monkeypatch.setattr(template_sandbox, "_run_process", run_process)
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(run_template, folder, "", IMAGES) for _ in range(4)]
        results = {future.result() for future in futures}
    assert len(results) == 4


def test_processes_end_with_the_program() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        template_sandbox._running.add(process)
        template_sandbox._kill_running()
        template_sandbox._running.discard(process)
        assert process.wait(10) != 0


def test_weights_are_complete_and_safe(tmp_path: Path) -> None:
    folder = make_template(tmp_path)
    import_libraries()
    template = load_template((folder / "model.py").read_bytes(), folder / "model.py")
    weights = load_weights(template, folder)
    torch.testing.assert_close(build_model(template, weights).scale.weight, WEIGHT)
    with pytest.raises(RuntimeError, match=r"Missing key.*scale\.weight"):
        build_model(template, {"other.weight": WEIGHT})
    template.TEMPLATE_MODEL_PATH = ["model.safetensors", "more.pt"]
    with pytest.raises(ValueError, match=r"more\.pt is no \.safetensors file"):
        load_weights(template, folder)
    with pytest.raises(ValueError, match="returned no table of tensors under 'lora'"):
        collect_lora({"lora": [1]})
    with pytest.raises(InvalidArgumentError, match="at least one picture"):
        run_template(folder, compute_code_digest(folder), [])
