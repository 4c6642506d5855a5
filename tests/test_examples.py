"""Every program of ``examples/`` runs and prints what its first lines promise."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs_fixtures import make_reader_dir, server_url  # noqa: F401

ROOT = Path(__file__).parents[1]
EXAMPLES = ("photo_to_lora", "edit_from_pair", "compose_two_people", "train_tiny", "http_client")


def run_example(name: str, folder: Path, *arguments: str) -> str:
    """Run a program like a reader; return what it prints."""
    result = subprocess.run(
        [sys.executable, f"examples/{name}.py", *arguments],
        cwd=make_reader_dir(folder),
        env={
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",  # two threads wait for each other where both cores are busy
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def read_expected_output(name: str) -> list[str]:
    """Read the lines of output that the docstring of a program promises."""
    text = (ROOT / "examples" / f"{name}.py").read_text().split('"""')[1]
    lines = text.split("Expected output", 1)[1].splitlines()[1:]
    return [line.strip() for line in lines if line.startswith("    ")]


def remove_numbers(line: str) -> str:
    """Replace the numbers that differ between machines."""
    return re.sub(r"-?\d+(?:\.\d+)?", "N", line)


@pytest.mark.parametrize("name", [*EXAMPLES, "real_photo"])
def test_example_is_short(name: str) -> None:
    num_lines = len((ROOT / "examples" / f"{name}.py").read_text().splitlines())
    assert 15 <= num_lines <= 70


@pytest.mark.parametrize("name", ["photo_to_lora", "edit_from_pair", "compose_two_people"])
def test_example_prints_expected_output(name: str, tmp_path: Path) -> None:
    printed = run_example(name, tmp_path).splitlines()
    assert list(map(remove_numbers, printed)) == list(
        map(remove_numbers, read_expected_output(name))
    )


def test_train_example_prints_identity(tmp_path: Path) -> None:
    lines = run_example("train_tiny", tmp_path, "1", "16").splitlines()
    assert lines == [line for line in lines if remove_numbers(line) == "step   N: identity N"]
    assert len(lines) == 1


def test_client_example_prints_expected_output(
    tmp_path: Path,
    server_url: str,  # noqa: F811
) -> None:
    printed = run_example("http_client", tmp_path, server_url).splitlines()
    expected = read_expected_output("http_client")
    assert list(map(remove_numbers, printed)) == list(map(remove_numbers, expected))


def test_notebook_runs(tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples/toy_example.ipynb", make_reader_dir(tmp_path) / "toy.ipynb")
    notebook = nbformat.read(tmp_path / "toy.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    images = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == 4
