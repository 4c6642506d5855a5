"""``main_callback convert``, ``combine``, ``diff``, ``resize``, ``scale`` and ``split``: arithmetic on LoRA files.

Every verb prints what its result lost: ‖ΔW - ΔŴ‖ / ‖ΔW‖ against the exact answer, as read back from the written file.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hyperlora.lora.io.load import LoraFile
    from hyperlora.lora.io.metadata import LoraMetadata
    from hyperlora.lora.weights import LoraWeights

_Output = Annotated[Path, typer.Option("-o", "--out", help="File to write.")]
_Format = Annotated[
    str | None, typer.Option(help="diffusers, kohya or sgm (SDXL); by default the input's.")
]
_Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
_Rank = Annotated[int | None, typer.Option(min=1, help="Rank of the result.")]
BLORA_BLOCKS = ("content=unet.up_blocks.0.attentions.0", "style=unet.up_blocks.0.attentions.1")
"""B-LoRA's two blocks of SDXL (2403.14572)."""


def convert(
    file: Annotated[Path, typer.Argument(help="LoRA file.")],
    output: _Output,
    format: Annotated[str, typer.Option(help="diffusers, kohya or sgm (SDXL).")] = "diffusers",
    dtype: _Dtype = "float32",
) -> None:
    """Write a LoRA with the keys of other tools."""
    lora_file = _load_lora_file(file)
    _save_lora_with_error(
        lora_file.weights, lora_file.weights, output, lora_file.metadata, format, dtype
    )


def combine(
    files: Annotated[list[str], typer.Argument(help="FILE or FILE:WEIGHT, two or more.")],
    output: _Output,
    method: Annotated[
        str, typer.Option(help="concat, svd, linear, ties, dare, dare_ties or magnitude.")
    ] = "concat",
    rank: _Rank = None,
    density: Annotated[
        float, typer.Option(help="Fraction of numbers that ties, dare and magnitude keep.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Which numbers dare drops.")] = 0,
    format: _Format = None,
    dtype: _Dtype = "float32",
) -> None:
    """Add LoRAs: the exact sum (ranks add), or one of lower rank."""
    from hyperlora.cli.options import parse_weighted_path
    from hyperlora.lora.merge import merge

    weighted_paths = [parse_weighted_path(text) for text in files]
    lora_files = [_load_lora_file(path) for path, _ in weighted_paths]
    weights = [weight for _, weight in weighted_paths]
    exact = merge([r.weights for r in lora_files], weights)
    merged = merge([r.weights for r in lora_files], weights, method, rank, density, seed)
    title = " + ".join(
        f"{w:g} {r.metadata.title or p.stem}"
        for (p, w), r in zip(weighted_paths, lora_files, strict=True)
    )
    _save_lora_with_error(
        merged,
        exact,
        output,
        _merge_metadata(lora_files, title),
        format or lora_files[0].format,
        dtype,
    )


def diff(
    after: Annotated[Path, typer.Argument(help="LoRA file.")],
    before: Annotated[Path, typer.Argument(help="LoRA file to take away from it.")],
    output: _Output,
    rank: _Rank = None,
    format: _Format = None,
    dtype: _Dtype = "float32",
) -> None:
    """AFTER - BEFORE: the change between two LoRAs."""
    from hyperlora.lora.merge import merge

    lora_files = [_load_lora_file(after), _load_lora_file(before)]
    exact = merge([r.weights for r in lora_files], [1.0, -1.0])
    difference = exact if rank is None else exact.resize(rank)
    title = f"{lora_files[0].metadata.title or after.stem} - {lora_files[1].metadata.title or before.stem}"
    _save_lora_with_error(
        difference,
        exact,
        output,
        _merge_metadata(lora_files, title),
        format or lora_files[0].format,
        dtype,
    )


def resize(
    file: Annotated[Path, typer.Argument(help="LoRA file.")],
    output: _Output,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the result.")],
    format: _Format = None,
    dtype: _Dtype = "float32",
) -> None:
    """The best approximation of a LoRA at another rank (SVD)."""
    lora_file = _load_lora_file(file)
    _save_lora_with_error(
        lora_file.weights.resize(rank),
        lora_file.weights,
        output,
        lora_file.metadata,
        format or lora_file.format,
        dtype,
    )


def scale(
    file: Annotated[Path, typer.Argument(help="LoRA file.")],
    output: _Output,
    factor: Annotated[
        float | None, typer.Option(help="Factor of the whole LoRA (-1 inverts it).")
    ] = None,
    block: Annotated[
        list[str] | None, typer.Option(help="BLOCK=FACTOR, e.g. unet.mid_block=0; repeat.")
    ] = None,
    format: _Format = None,
    dtype: _Dtype = "float32",
) -> None:
    """Make a LoRA, or some of its blocks, stronger, weaker or inverted."""
    from hyperlora.errors import InvalidArgumentError
    from hyperlora.lora.blocks import scale_blocks
    from hyperlora.lora.merge import validate_weights

    if factor is None and not block:
        raise InvalidArgumentError("by how much? Give --by FACTOR or --block BLOCK=FACTOR")
    block_factors = {
        name: _parse_factor(name, value) for name, value in map(_parse_name_value, block or [])
    }
    lora_file = _load_lora_file(file)
    scaled = (
        scale_blocks(lora_file.weights, block_factors)
        * validate_weights([1.0 if factor is None else factor], 1)[0]
    )
    _save_lora_with_error(
        scaled, scaled, output, lora_file.metadata, format or lora_file.format, dtype
    )


def split(
    file: Annotated[Path, typer.Argument(help="LoRA file.")],
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder: one file per part.")],
    part: Annotated[
        list[str] | None, typer.Option(help="NAME=BLOCK[,BLOCK...]; B-LoRA's of SDXL if none.")
    ] = None,
    format: _Format = None,
    dtype: _Dtype = "float32",
) -> None:
    """Take a LoRA apart by blocks, e.g. content and style."""
    from hyperlora.cli.options import check_output_dir
    from hyperlora.errors import InvalidArgumentError
    from hyperlora.lora.blocks import select_blocks as part_of

    blocks_by_part = dict(map(_parse_name_value, part or BLORA_BLOCKS))
    check_output_dir(output)
    if invalid_names := [
        name for name in blocks_by_part if not name or not set(name) <= _FILE_NAME_CHARS
    ]:
        raise InvalidArgumentError(
            f"part {invalid_names[0]!r} cannot name a file: letters, digits, - and _ expected"
        )
    lora_file = _load_lora_file(file)
    loras_by_part = {
        name: part_of(lora_file.weights, blocks.split(","))
        for name, blocks in blocks_by_part.items()
    }
    for name, weights in loras_by_part.items():
        title = f"{lora_file.metadata.title or file.stem} ({name})"
        header = replace(lora_file.metadata, title=title)
        _save_lora_with_error(
            weights,
            weights,
            output / f"{name}.safetensors",
            header,
            format or lora_file.format,
            dtype,
        )


_FILE_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def _load_lora_file(path: Path) -> "LoraFile":
    from hyperlora.lora.io.load import load_lora

    return load_lora(path)


def _save_lora_with_error(
    weights: "LoraWeights",
    reference: "LoraWeights",
    output_path: Path,
    metadata: "LoraMetadata",
    format: str,
    dtype: str,
) -> None:
    import torch

    from hyperlora.cli.options import check_output_file
    from hyperlora.errors import InvalidArgumentError
    from hyperlora.lora.io.load import load_lora
    from hyperlora.lora.io.save import save_lora
    from hyperlora.lora.merge import compute_relative_error

    check_output_file(output_path, ".safetensors")
    torch_dtype: Any = {
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }.get(dtype)
    if torch_dtype is None:
        raise InvalidArgumentError(f"unknown dtype {dtype!r}; known: float32, float16, bfloat16")
    save_lora(
        weights, output_path, format=format, metadata=replace(metadata, date=""), dtype=torch_dtype
    )  # type: ignore[arg-type]
    error = compute_relative_error(load_lora(output_path).weights, reference)
    typer.echo(
        f"{output_path}: rank {weights.layout.rank}, {len(weights.layout.targets)} sites, {format}, error {error:.2g}"
    )


def _merge_metadata(lora_files: "list[LoraFile]", title: str) -> "LoraMetadata":
    """The header of a LoRA made of several: what they share, and each one's phrase, licence and photos."""
    metadata = [r.metadata for r in lora_files]

    def join_unique(field: str) -> str:
        return ", ".join(dict.fromkeys(text for h in metadata if (text := getattr(h, field))))

    return replace(
        metadata[0],
        title=title,
        trigger_phrase=join_unique("trigger_phrase"),
        license=join_unique("license"),
        encoder=join_unique("encoder"),
        encoder_license=join_unique("encoder_license"),
        reference_sha256=tuple(dict.fromkeys(d for h in metadata for d in h.reference_sha256)),
        recommended_strength=1.0,
        extra={},
    )


def _parse_name_value(text: str) -> tuple[str, str]:
    from hyperlora.errors import InvalidArgumentError

    name, equals, value = text.partition("=")
    if not equals:
        raise InvalidArgumentError(f"NAME=VALUE expected, got {text!r}")
    return name, value


def _parse_factor(name: str, value: str) -> float:
    from hyperlora.errors import InvalidArgumentError

    try:
        return float(value)
    except ValueError:
        raise InvalidArgumentError(
            f"the factor of block {name!r} must be a number, got {value!r}"
        ) from None
