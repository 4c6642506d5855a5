"""Every program of ``examples/`` runs and prints what its first lines promise."""

import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs_fixtures import (
    few_steps,  # noqa: F401
    make_reader_dir,
    read_expected_output,
    remove_numbers,
    run_example,  # noqa: F401
)

ROOT = Path(__file__).parents[1]
RunExample = Callable[..., str]
EXAMPLES = ("photo_to_lora", "edit_from_pair", "compose_two_people", "train_tiny", "http_client")


@pytest.mark.parametrize("name", [*EXAMPLES, "real_photo"])
def test_example_is_short(name: str) -> None:
    num_lines = len((ROOT / "examples" / f"{name}.py").read_text().splitlines())
    assert 15 <= num_lines <= 70


@pytest.mark.parametrize("name", ["photo_to_lora", "edit_from_pair", "compose_two_people"])
@pytest.mark.usefixtures("few_steps")
def test_example_prints_expected_output(
    name: str,
    run_example: RunExample,  # noqa: F811
) -> None:
    printed = run_example(name).splitlines()
    assert list(map(remove_numbers, printed)) == list(
        map(remove_numbers, read_expected_output(name))
    )


@pytest.mark.usefixtures("few_steps")
def test_train_example_prints_identity(run_example: RunExample) -> None:  # noqa: F811
    lines = run_example("train_tiny", "1", "16").splitlines()
    assert lines == [line for line in lines if remove_numbers(line) == "step   N: identity N"]
    assert len(lines) == 1


def test_notebook_runs(tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples/toy_example.ipynb", make_reader_dir(tmp_path) / "toy.ipynb")
    notebook = nbformat.read(tmp_path / "toy.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "num_inference_steps=12" in cell.source]
    cell.source = cell.source.replace("num_inference_steps=12", "num_inference_steps=2")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    images = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == 4
