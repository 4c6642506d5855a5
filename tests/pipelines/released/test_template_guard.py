"""What guarded code must not do ends its process, and is named."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUARDED = """
import sys
from pathlib import Path
from hyperlora.pipelines.released.template_guard import Guard, list_readable_dirs
report = lambda action: print("it", action, flush=True)
sys.addaudithook(Guard(Path(sys.argv[1]), list_readable_dirs(Path(sys.argv[2])), report))
exec(sys.argv[3])
print("passed")
"""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with one file, beside those of the guarded process."""
    for name in ("work", "model", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside/kept.txt").write_text("kept")
    return tmp_path / "outside"


def run_guarded(outside: Path, code: str) -> str:
    command = [sys.executable, "-I", "-c", GUARDED, str(outside.parent / "work")]
    result = subprocess.run(
        [*command, str(outside.parent / "model"), code.replace("{outside}", str(outside))],
        cwd=outside.parent / "work",
        capture_output=True,
        text=True,
    )
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "network"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')", "network"),
        ("import os; os.system('true')", "another program"),
        ("import subprocess; subprocess.run(['true'])", "another program"),
        ("import os; os.fork()", "another program"),
        ("import ctypes; ctypes.CDLL(None)", "another program"),
        ("open('{outside}/stolen.txt', 'w')", "wrote .*stolen.txt"),
        ("import pathlib; pathlib.Path('{outside}/kept.txt').unlink()", "changed .*kept.txt"),
        ("import os; os.rename('{outside}/kept.txt', 'mine.txt')", "changed .*kept.txt"),
        ("import os; os.symlink('{outside}', 'link'); open('link/x', 'w')", "changed .*outside"),
        ("import os; f = os.open('/usr', os.O_RDONLY); os.open('x', 64, dir_fd=f)", "folder /usr"),
        ("open('{outside}/kept.txt').read()", "read .*kept.txt"),
        (
            "try:\n    open('{outside}/x', 'w')\nexcept BaseException:\n    pass",
            "wrote .*x",
        ),
    ],
)
def test_forbidden_action_ends_the_process_and_is_named(
    outside: Path, action: str, message: str
) -> None:
    assert re.fullmatch(f"it .*{message}.*", run_guarded(outside, action))
    assert [path.name for path in outside.iterdir()] == ["kept.txt"]
    assert (outside / "kept.txt").read_text() == "kept"


@pytest.mark.parametrize(
    "action",
    [
        "open('mine.txt', 'w').write('x'); assert open('mine.txt').read() == 'x'",
        "open('{outside}/../model/code.txt')",
        "import json, sqlite3, concurrent.futures",
        "import os; os.mkdir('a'); os.rename('a', 'b'); os.rmdir('b')",
        "open('/dev/null', 'w').write('x')",
    ],
)
def test_ordinary_work_passes(outside: Path, action: str) -> None:
    (outside.parent / "model/code.txt").write_text("x")
    assert run_guarded(outside, action) == "passed"


def test_library_that_the_code_wrote_itself_is_not_loaded(outside: Path) -> None:
    action = (
        "import importlib.machinery as m, importlib.util as u; open('x.so', 'w').write('x');"
        "l = m.ExtensionFileLoader('x', 'x.so'); u.module_from_spec(u.spec_from_loader('x', l))"
    )
    assert "loaded a library that it wrote itself" in run_guarded(outside, action)
