"""``hyperlora inspect``."""

import json
from pathlib import Path
from typing import Annotated

import typer


def inspect(
    file: Annotated[Path, typer.Argument(help="LoRA file (.safetensors).")],
    base: Annotated[str | None, typer.Option(help="Also check that it fits this base: folder or hub id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable result.")] = False,
) -> None:
    """What a LoRA file is: base, rank, sites, norms, header, and whether it fits a base."""
    from dataclasses import asdict

    from hyperlora.lora.io.inspect import describe

    modules = None
    if base is not None:
        from hyperlora.diffusion.diffusion_base import load_base

        modules = load_base(base).modules
    found = asdict(describe(file, modules=modules))
    if base is not None:
        found["fits"] = base
    if as_json:
        typer.echo(json.dumps(found))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title=_plain(found.pop("name")))
    header = found.pop("header")
    for key, value in found.items():
        table.add_row(key, _plain(", ".join(map(str, value)) if isinstance(value, tuple) else str(value)))
    for key, value in header.items():
        if value:
            table.add_row(f"header {key}", _plain(str(value)))
    Console().print(table)


def _plain(text: str) -> str:
    """A stranger's text as it stands: neither Rich's markup nor the terminal's escape codes act in it."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else "�" for c in text))
