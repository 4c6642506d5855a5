"""``hyperlora convert``, ``combine``, ``diff``, ``resize``, ``scale`` and ``split``: arithmetic on LoRA files.

Every verb prints what its result lost: ‖ΔW - ΔŴ‖ / ‖ΔW‖ against the exact answer, as read back from the written file.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hyperlora.lora.io.load import LoraFile
    from hyperlora.lora.io.metadata import LoraHeader
    from hyperlora.lora.weights import LoraWeights

_Out = Annotated[Path, typer.Option("-o", "--out", help="File to write.")]
_Format = Annotated[str | None, typer.Option(help="diffusers, kohya or sgm (SDXL); by default the input's.")]
_Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
_Rank = Annotated[int | None, typer.Option(min=1, help="Rank of the result.")]
BLORA = ("content=unet.up_blocks.0.attentions.0", "style=unet.up_blocks.0.attentions.1")
"""B-LoRA's two blocks of SDXL (2403.14572)."""


def convert(
    file: Annotated[Path, typer.Argument(help="LoRA file.")],
    out: _Out,
    format: Annotated[str, typer.Option(help="diffusers, kohya or sgm (SDXL).")] = "diffusers",
    dtype: _Dtype = "float32",
) -> None:
    """Write a LoRA with the keys of other tools."""
    read = _read(file)
    _write(read.weights, read.weights, out, read.header, format, dtype)


def combine(
    files: Annotated[list[str], typer.Argument(help="FILE or FILE:WEIGHT, two or more.")],
    out: _Out,
    how: Annotated[str, typer.Option(help="concat, svd, linear, ties, dare, dare_ties or magnitude.")] = "concat",
    rank: _Rank = None,
    density: Annotated[float, typer.Option(help="Fraction of numbers that ties, dare and magnitude keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Which numbers dare drops.")] = 0,
    format: _Format = None,
    dtype: _Dtype = "float32",
) -> None:
    """Add LoRAs: the exact sum (ranks add), or one of lower rank."""
    from hyperlora.cli.options import weighted
    from hyperlora.lora.merge import merge

    chosen = [weighted(text) for text in files]
    read = [_read(path) for path, _ in chosen]
    weights = [weight for _, weight in chosen]
    exact = merge([r.weights for r in read], weights)
    made = merge([r.weights for r in read], weights, how, rank, density, seed)
    title = " + ".join(f"{w:g} {r.header.title or p.stem}" for (p, w), r in zip(chosen, read, strict=True))
    _write(made, exact, out, _joined(read, title), format or read[0].format, dtype)


def diff(
    after: Annotated[Path, typer.Argument(help="LoRA file.")],
    before: Annotated[Path, typer.Argument(help="LoRA file to take away from it.")],
    out: _Out,
    rank: _Rank = None,
    format: _Format = None,
    dtype: _Dtype = "float32",
) -> None:
    """AFTER - BEFORE: the change between two LoRAs."""
    from hyperlora.lora.merge import merge

    read = [_read(after), _read(before)]
    exact = merge([r.weights for r in read], [1.0, -1.0])
    made = exact if rank is None else exact.resize(rank)
    title = f"{read[0].header.title or after.stem} - {read[1].header.title or before.stem}"
    _write(made, exact, out, _joined(read, title), format or read[0].format, dtype)


def resize(
    file: Annotated[Path, typer.Argument(help="LoRA file.")],
    out: _Out,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the result.")],
    format: _Format = None,
    dtype: _Dtype = "float32",
) -> None:
    """The best approximation of a LoRA at another rank (SVD)."""
    read = _read(file)
    _write(read.weights.resize(rank), read.weights, out, read.header, format or read.format, dtype)


def scale(
    file: Annotated[Path, typer.Argument(help="LoRA file.")],
    out: _Out,
    by: Annotated[float | None, typer.Option(help="Factor of the whole LoRA (-1 inverts it).")] = None,
    block: Annotated[list[str] | None, typer.Option(help="BLOCK=FACTOR, e.g. unet.mid_block=0; repeat.")] = None,
    format: _Format = None,
    dtype: _Dtype = "float32",
) -> None:
    """Make a LoRA, or some of its blocks, stronger, weaker or inverted."""
    from hyperlora.errors import BadRequest
    from hyperlora.lora.blocks import weigh_blocks
    from hyperlora.lora.merge import checked_weights

    if by is None and not block:
        raise BadRequest("by how much? Give --by FACTOR or --block BLOCK=FACTOR")
    factors = {name: _factor(name, value) for name, value in map(_named, block or [])}
    read = _read(file)
    made = weigh_blocks(read.weights, factors) * checked_weights([1.0 if by is None else by], 1)[0]
    _write(made, made, out, read.header, format or read.format, dtype)


def split(
    file: Annotated[Path, typer.Argument(help="LoRA file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder: one file per part.")],
    part: Annotated[list[str] | None, typer.Option(help="NAME=BLOCK[,BLOCK...]; B-LoRA's of SDXL if none.")] = None,
    format: _Format = None,
    dtype: _Dtype = "float32",
) -> None:
    """Take a LoRA apart by blocks, e.g. content and style."""
    from hyperlora.cli.options import require_folder
    from hyperlora.errors import BadRequest
    from hyperlora.lora.blocks import part as part_of

    wanted = dict(map(_named, part or BLORA))
    require_folder(out)
    if bad := [name for name in wanted if not name or not set(name) <= _SAFE]:
        raise BadRequest(f"part {bad[0]!r} cannot name a file: letters, digits, - and _ expected")
    read = _read(file)
    parts = {name: part_of(read.weights, blocks.split(",")) for name, blocks in wanted.items()}
    for name, weights in parts.items():
        title = f"{read.header.title or file.stem} ({name})"
        header = replace(read.header, title=title)
        _write(weights, weights, out / f"{name}.safetensors", header, format or read.format, dtype)


_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def _read(path: Path) -> "LoraFile":
    from hyperlora.lora.io.load import load_lora

    return load_lora(path)


def _write(made: "LoraWeights", exact: "LoraWeights", out: Path, header: "LoraHeader", format: str, dtype: str) -> None:
    import torch

    from hyperlora.cli.options import require_file
    from hyperlora.errors import BadRequest
    from hyperlora.lora.io.load import load_lora
    from hyperlora.lora.io.save import save_lora
    from hyperlora.lora.merge import relative_error

    require_file(out, ".safetensors")
    kind: Any = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype)
    if kind is None:
        raise BadRequest(f"unknown dtype {dtype!r}; known: float32, float16, bfloat16")
    save_lora(made, out, format=format, header=replace(header, date=""), dtype=kind)  # type: ignore[arg-type]
    error = relative_error(load_lora(out).weights, exact)
    typer.echo(f"{out}: rank {made.layout.rank}, {len(made.layout.sites)} sites, {format}, error {error:.2g}")


def _joined(read: "list[LoraFile]", title: str) -> "LoraHeader":
    """The header of a LoRA made of several: what they share, and each one's phrase, licence and photos."""
    headers = [r.header for r in read]

    def each(field: str) -> str:
        return ", ".join(dict.fromkeys(text for h in headers if (text := getattr(h, field))))

    return replace(
        headers[0],
        title=title,
        trigger_phrase=each("trigger_phrase"),
        license=each("license"),
        encoder=each("encoder"),
        encoder_license=each("encoder_license"),
        reference_sha256=tuple(dict.fromkeys(d for h in headers for d in h.reference_sha256)),
        recommended_strength=1.0,
        extra={},
    )


def _named(text: str) -> tuple[str, str]:
    from hyperlora.errors import BadRequest

    name, equals, value = text.partition("=")
    if not equals:
        raise BadRequest(f"NAME=VALUE expected, got {text!r}")
    return name, value


def _factor(name: str, value: str) -> float:
    from hyperlora.errors import BadRequest

    try:
        return float(value)
    except ValueError:
        raise BadRequest(f"the factor of block {name!r} must be a number, got {value!r}") from None
