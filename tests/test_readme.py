"""Every command and program of the README does what it says, on the shipped bundle."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for kind, block in BLOCKS
    if kind != "python"
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("hyperlora ")
]
ENVIRONMENT = {
    k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"
}  # all cores, as a reader has them
QUICKER = {
    "evaluate": ["--people", "2", "--steps", "2"],
    "edit": ["--steps", "4"],
}  # the same paths with less work


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what a reader of the README has: the repository, a photo and a folder of photos."""
    folder = tmp_path_factory.mktemp("desk")
    people = sorted((ROOT / "checkpoints/avatars/test/subjects").iterdir())
    shutil.copy(people[0] / "0.webp", folder / "me.png")  # formats are told by content
    edit = ROOT / "checkpoints/avatars/test-edits/000-glasses"
    shutil.copy(edit / "shown-0_before.webp", folder / "a.png")
    shutil.copy(edit / "shown-0_after.webp", folder / "a-edited.png")
    (folder / "photos").mkdir()
    for person in people[:3]:
        shutil.copy(person / "0.webp", folder / "photos" / f"{person.name}.webp")
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    return folder


def run(arguments, folder):
    done = subprocess.run(
        arguments, cwd=folder, capture_output=True, text=True, timeout=300, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_two_commands_are_there_with_what_to_do_without_uv():
    for command in ("uv run hyperlora demo", "uv run pytest"):
        assert re.search(rf"^{command}\s+# .*pip install uv", TEXT, re.MULTILINE)


def test_ci_runs_the_readmes_test_command():
    assert "\nuv run pytest\n" in (ROOT / ".ci/run").read_text()


@pytest.fixture(scope="module")
def server(desk):
    """`hyperlora serve` as the README has it, at the address the README's program asks."""
    hyperlora = str(Path(sys.executable).with_name("hyperlora"))
    process = subprocess.Popen(
        [hyperlora, "serve", "--state", str(desk / "state")], cwd=desk, stderr=subprocess.PIPE
    )
    for _ in range(600):
        try:
            with urllib.request.urlopen("http://127.0.0.1:8000/readyz"):
                break
        except OSError:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.1)
    yield
    process.terminate()
    assert process.wait(60) in (
        0,
        -signal.SIGTERM,
    )  # uvicorn ends by the signal it was given, when all is done


def test_commands_do_what_they_say(desk):
    hyperlora = str(Path(sys.executable).with_name("hyperlora"))
    verbs = set()
    for command in COMMANDS:
        _, verb, *arguments = shlex.split(command)
        verbs.add(verb)
        if verb == "serve":  # the fixture does it for the programs
            continue
        if verb == "train":  # every configuration is run by test_configs
            assert (ROOT / arguments[arguments.index("--config") + 1]).is_file()
            continue
        run([hyperlora, verb, *arguments, *QUICKER.get(verb, [])], desk)
    assert verbs == {
        "generate",
        "render",
        "inspect",
        "edit",
        "evaluate",
        "train",
        "combine",
        "convert",
        "scale",
        "serve",
    }
    assert (desk / "back.safetensors").stat().st_size > 10_000
    assert (desk / "edited" / "me.png").stat().st_size > 1000
    assert {p.name for p in (desk / "loras").iterdir()} >= {"index.jsonl"}
    assert all((desk / f"{name}.png").stat().st_size > 1000 for name in ("out", "guided", "two"))
    for report in ("report", "report-edits"):
        assert (desk / report / "report.md").read_text().count("|") > 20


@pytest.mark.heavy
def test_programs_do_what_they_say(desk, server):
    programs = [block for kind, block in BLOCKS if kind == "python"]
    assert len(programs) == 5
    for program in programs:
        (desk / "out.png").unlink(missing_ok=True)
        run([sys.executable, "-c", program], desk)
    for name in ("me", "change", "undo"):
        assert (desk / f"{name}.safetensors").stat().st_size > 10_000
    assert (desk / "out.png").stat().st_size > 1000


@pytest.mark.heavy
def test_demo(desk):
    hyperlora = str(Path(sys.executable).with_name("hyperlora"))
    told = run([hyperlora, "demo", "--people", "2"], desk)
    assert "ms from photo to LoRA" in told
    names = {p.name for p in (desk / "demo").iterdir()}
    assert {"demo.png", "edits.png"} <= names
    assert "ms from a pair to a LoRA" in told
    assert len([n for n in names if n.endswith(".safetensors")]) == 4
