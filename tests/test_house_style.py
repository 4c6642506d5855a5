"""Names and docstrings: what a reader of diffusers or PEFT may expect of every public function."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("hyperlora/**/*.py"), *ROOT.glob("data_builder/**/*.py")])
FRAMEWORK_NAMES = {
    # Lightning, torch, typer and ASGI call these by name
    *("forward", "backward", "setup", "main", "dispatch", "filter", "flatten", "unflatten"),
    *("training_step", "validation_step", "on_train_end", "on_after_batch_transfer"),
    *("train_dataloader", "val_dataloader", "configure_optimizers"),
    *("from_pretrained", "from_config", "from_dict", "from_json", "from_metadata", "from_module"),
    *("to_dict", "to_config", "to_metadata", "to_json"),
}
PARTICIPLE = re.compile(r"[a-z]+ed$")
NO_PARTICIPLE = {"embed", "feed", "seed", "need", "speed", "from_pretrained", "save_pretrained"}


Function = ast.FunctionDef | ast.AsyncFunctionDef


def list_functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Every function of a file with its qualified name; ``outer()`` stands before nested ones."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, Function):
                yield f"{prefix}{child.name}", child
                yield from walk(child, f"{prefix}{child.name}().")
            else:
                yield from walk(child, prefix)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), "")


def is_public(qualified_name: str) -> bool:
    """Whether users may call it: no part of its name is private, and no function holds it."""
    return "()" not in qualified_name and not any(
        part.startswith("_") for part in qualified_name.split(".")
    )


def num_arguments(node: Function) -> int:
    """Arguments besides ``self`` and ``cls``."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([a for a in arguments if a.arg not in ("self", "cls")])


def is_command(path: Path) -> bool:
    """Whether a file holds typer commands, whose options carry their own help."""
    return path.parent.name == "cli"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_not_named_by_participles(path: Path) -> None:
    names = [name.split(".")[-1].strip("_") for name, _ in list_functions(path)]
    bad = [
        n
        for n in names
        if PARTICIPLE.search(n.split("_")[-1]) and n.split("_")[-1] not in NO_PARTICIPLE
    ]
    assert not [n for n in bad if n not in NO_PARTICIPLE], (
        f"{bad}: begin with a verb in the infinitive"
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_document_their_arguments(path: Path) -> None:
    missing = []
    for name, node in list_functions(path):
        if not is_public(name) or name.split(".")[-1].startswith("__") or is_command(path):
            continue
        text = ast.get_docstring(node) or ""
        decorators = [ast.unparse(d) for d in node.decorator_list]
        if any("override" in d or "validator" in d for d in decorators):
            continue
        if not text or (num_arguments(node) >= 2 and "Args:" not in text):
            missing.append(f"{name}:{node.lineno}")
    assert not missing, f"{missing}: a sentence, and Args: for two or more arguments"


def test_ruff_finds_nothing() -> None:
    for command in (("check",), ("format", "--check")):
        result = subprocess.run(
            ["ruff", *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
