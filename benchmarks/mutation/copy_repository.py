"""Copy the repository for mutmut, which calls each function through another one.

It mutates no decorated function. ``@decorator`` above a function means the same as
``name = decorator(name)`` below it, so the copy has the latter and every function is mutated.

``save_hyperparameters`` of Lightning reads the frame of ``__init__``, so the functions that call it
are marked to be left alone.
"""

import ast
import os
import subprocess
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

_MOVED_DECORATORS: Final = {"torch.no_grad()", "contextmanager", "property", "cached_property"}
_DROPPED_DECORATORS: Final = {"override"}  # for type checkers only
_FRAME_READER: Final = "self.save_hyperparameters()"


def copy_repository(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy all files of git's index whose content differs from the copy's.

    Args:
        source: The repository.
        target: Folder of the copy.
        patterns: Files that are mutated, as ``fnmatch`` patterns.
    """
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=source,
        capture_output=True,
        check=True,
    )
    names = {name for name in listing.stdout.decode().splitlines() if (source / name).is_file()}
    for name in names:
        content = (source / name).read_bytes()
        if any(fnmatch(name, pattern) for pattern in patterns):
            content = prepare_source(content.decode()).encode()
        path = target / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for path in _list_files(target):
        if str(path.relative_to(target)) not in names:
            path.unlink()


def prepare_source(text: str) -> str:
    """Move decorators behind their functions, and mark functions that are not to be mutated.

    Args:
        text: Source of a module.

    Returns:
        Source with the same meaning.
    """
    lines = text.splitlines()
    # from the last function to the first, so that line numbers before it stay
    functions = sorted(_list_functions(ast.parse(text)), key=lambda node: -node.lineno)
    for function in functions:
        if any(ast.unparse(statement) == _FRAME_READER for statement in function.body):
            header_end = next(
                i for i in range(function.lineno - 1, len(lines)) if lines[i].endswith(":")
            )
            lines[header_end] += "  # pragma: no mutate block"
        _move_decorators(lines, function)
    return "\n".join(lines) + "\n"


def _move_decorators(lines: list[str], function: ast.FunctionDef) -> None:
    """Move the decorators of a function in the lines of its module, if all can be moved."""
    names = [ast.unparse(node) for node in function.decorator_list]
    if not names or not set(names) <= _MOVED_DECORATORS | _DROPPED_DECORATORS:
        return
    indent = " " * function.col_offset
    moved = [name for name in reversed(names) if name in _MOVED_DECORATORS]
    end = function.end_lineno or function.lineno
    lines[end:end] = [
        f"{indent}{function.name} = {decorator}({function.name})" for decorator in moved
    ]
    del lines[function.decorator_list[0].lineno - 1 : function.lineno - 1]


def _list_functions(module: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions of a module and methods of its classes."""
    for node in module.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        yield from (member for member in members if isinstance(member, ast.FunctionDef))


def _list_files(folder: Path) -> Iterator[Path]:
    """Files of a copy but for mutmut's own."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("mutants", "__pycache__")]
        yield from (Path(root) / name for name in names)
