"""``hyperlora inspect``."""

import json
from pathlib import Path
from typing import Annotated

import typer


def inspect(
    file: Annotated[Path, typer.Argument(help="LoRA file (.safetensors).")],
    base: Annotated[
        str | None, typer.Option(help="Check that the LoRA fits this base: folder or hub id.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show base, rank, target modules, norms and metadata of a LoRA file."""
    from dataclasses import asdict

    from hyperlora.lora.io.inspect import inspect_lora

    modules = None
    if base is not None:
        from hyperlora.diffusion.diffusion_base import load_diffusion_base

        modules = load_diffusion_base(base).modules
    info = asdict(inspect_lora(file, modules=modules))
    if base is not None:
        info["compatible_base"] = base
    if as_json:
        typer.echo(json.dumps(info))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title=_escape_text(info.pop("name")))
    metadata = info.pop("metadata")
    for key, value in info.items():
        text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        table.add_row(key, _escape_text(text))
    for key, value in metadata.items():
        if value:
            table.add_row(f"metadata {key}", _escape_text(str(value)))
    Console().print(table)


def _escape_text(text: str) -> str:
    """Escape text of an unknown file: neither Rich's markup nor terminal codes act in it."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else "�" for c in text))
