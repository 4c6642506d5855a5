"""``main_callback inspect``."""

import json
from pathlib import Path
from typing import Annotated

import typer


def inspect(
    file: Annotated[Path, typer.Argument(help="LoRA file (.safetensors).")],
    base: Annotated[
        str | None, typer.Option(help="Also check that it fits this base: folder or hub id.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable result.")] = False,
) -> None:
    """What a LoRA file is: base, rank, sites, norms, header, and whether it fits a base."""
    from dataclasses import asdict

    from hyperlora.lora.io.inspect import inspect_lora

    modules = None
    if base is not None:
        from hyperlora.diffusion.diffusion_base import load_diffusion_base

        modules = load_diffusion_base(base).modules
    info = asdict(inspect_lora(file, modules=modules))
    if base is not None:
        info["fits"] = base
    if as_json:
        typer.echo(json.dumps(info))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title=_escape_text(info.pop("name")))
    metadata = info.pop("header")
    for key, value in info.items():
        table.add_row(
            key,
            _escape_text(", ".join(map(str, value)) if isinstance(value, tuple) else str(value)),
        )
    for key, value in metadata.items():
        if value:
            table.add_row(f"header {key}", _escape_text(str(value)))
    Console().print(table)


def _escape_text(text: str) -> str:
    """A stranger's text as it stands: neither Rich's markup nor the terminal's escape codes act in it."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else "�" for c in text))
