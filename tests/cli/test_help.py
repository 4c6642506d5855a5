"""``--help`` of every command."""

from collections.abc import Callable
from typing import Any

import pytest

RunCommand = Callable[..., Any]


COMMANDS = [
    "demo",
    "edit",
    "generate",
    "render",
    "inspect",
    "evaluate",
    "train",
    "convert",
    "combine",
    "diff",
    "resize",
    "scale",
    "split",
]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_no_heavy_library(run_process: RunCommand, command: str) -> None:
    heavy_modules = "{'torch', 'numpy', 'PIL', 'diffusers', 'lightning'}"
    heavy_check = f"print('heavy:', *{heavy_modules} & {{*sys.modules}}, file=sys.stderr)"
    result = run_process(*([command] if command else []), "--help", final_code=heavy_check)
    assert (result.code, result.err.strip()) == (0, "heavy:")
    assert "Usage: " in result.out
    assert all(name in result.out for name in COMMANDS if not command)


@pytest.mark.slow
def test_train_shows_help_of_lightning(run: RunCommand) -> None:
    result = run("train", "fit", "--help")
    assert result.code == 0, result
    assert "--trainer.max_epochs" in result.out
