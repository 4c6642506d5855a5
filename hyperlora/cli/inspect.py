"""``hyperlora inspect``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hyperlora.cli.options import replace_unprintable
from hyperlora.paths import find_path

if TYPE_CHECKING:
    from hyperlora.pipelines.released.inspect_repository import RepositoryInfo


def inspect(
    file: Annotated[
        str,
        typer.Argument(
            help="LoRA file (.safetensors), or a network that others released: hub:ORG/NAME"
            "[:VARIANT], its folder or one of its files."
        ),
    ],
    base: Annotated[
        str | None, typer.Option(help="Check that the LoRA fits this base: folder or hub id.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    offline: Annotated[bool, typer.Option(help="Fetch nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show base, rank, target modules, norms and metadata of a LoRA file.

    Of a released network it shows kind, sizes, licenses and every tensor, from headers alone.
    """
    from dataclasses import asdict

    from hyperlora.lora.io.inspect import inspect_lora

    if (repository := _inspect_network(file, revision, offline)) is not None:
        _print_repository(repository, as_json)
        return
    modules = None
    if base is not None:
        from hyperlora.diffusion.diffusion_base import load_diffusion_base

        modules = load_diffusion_base(base).modules
    info = asdict(inspect_lora(Path(file), modules=modules))
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


def _inspect_network(file: str, revision: str | None, offline: bool) -> "RepositoryInfo | None":
    """Summarize a released network; None for a LoRA file."""
    from hyperlora.lora.io.safetensors_file import MAX_HEADER_BYTES
    from hyperlora.pipelines.released.hub_files import split_variant
    from hyperlora.pipelines.released.inspect_repository import (
        HUB_PREFIX,
        inspect_network_file,
        inspect_repository,
    )

    if file.startswith(HUB_PREFIX) or Path(split_variant(file)[0]).is_dir():
        return inspect_repository(file, revision, offline)
    path = find_path(Path(file))
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
        return None  # the LoRA reader says what is wrong
    return inspect_network_file(path)


def _print_repository(info: "RepositoryInfo", as_json: bool) -> None:
    """Print the summary of a released network."""
    if as_json:
        typer.echo(json.dumps(info.to_dict()))
        return
    typer.echo(f"{replace_unprintable(info.name)}: {info.kind} ({info.origin})")
    if any(info.variants):
        typer.echo(f"variants: {', '.join(info.variants)}")
    for card in info.cards[:1]:
        typer.echo(f"base: {card.base}")
        typer.echo(card.format_notice())
    for path, size in info.sizes.items():
        typer.echo(f"{replace_unprintable(path)}: {size:,} bytes")
    for path, header in info.headers.items():
        num_tensors = len(header.tensors)
        counts = f"{num_tensors} tensors, {header.numel:,} numbers"
        typer.echo(f"\n{replace_unprintable(path)}: {counts}, {header.digest}")
        for name, entry in header.tensors.items():
            typer.echo(f"  {replace_unprintable(name)} {entry.dtype} {list(entry.shape)}")


def _escape_text(text: str) -> str:
    """Escape text of an unknown file: neither Rich's markup nor terminal codes act in it."""
    from rich.markup import escape

    return escape(replace_unprintable(text))
